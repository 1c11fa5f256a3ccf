"""What many notebooks or commands of one run compute alike is computed once: for tests, not for users

Each has the demo model before it, and most of them the same text. What is remembered has its whole cause as its name:
the bytes of a tensor, the text, the format, the rounding.
"""
import hashlib
import json
import os
from pathlib import Path

import numpy as np

def digest(*parts: bytes) -> str: return hashlib.sha1(b' '.join(parts)).hexdigest()

def remember_grids():
    "`find_grid`, with what it gave for the same weight, format and statistics"
    import torch
    from optiq import gptq, grid
    find, known = grid._find_grid, {}
    def same(x): return digest(x.contiguous().view(torch.uint8).numpy())
    def find_grid(w, fmt, stats=None):
        if not isinstance(w, torch.Tensor): return find(w, fmt, stats)
        key = same(w), fmt, None if stats is None else same(stats.importance())
        if key not in known: known[key] = find(w, fmt, stats)
        return known[key]
    grid._find_grid = gptq._find_grid = find_grid

def remember_scores():
    "`evaluate`, with what it gave for the same tokens and a variant that is rounded alike, each unit by min-max"
    from optiq.backends.replay import Backend
    from optiq.calibration import fingerprint
    from optiq.evals import perplexity
    from optiq.formats import quantize_dequantize
    score, known = perplexity.evaluate, {}
    def rounded(variant): # ▸ paths and formats; None for other variants
        if not isinstance(variant, dict): return None
        plain = all(getattr(f, 'func', None) is quantize_dequantize and f.keywords.keys() == {'fmt'} for f in variant.values())
        return tuple((path, str(f.keywords['fmt'])) for path, f in sorted(variant.items())) if plain else None
    def evaluate(model, tokens, variants={}, *args, **options):
        if not isinstance(model, Backend) or not model.holds or not model.stacks or args or options.keys()-{'tick'}:
            return score(model, tokens, variants, *args, **options)
        where = model.checkpoint.fingerprint, model.name, str(model.dtype), fingerprint(tokens)
        keys = {name: (where, rounded(v)) for name, v in variants.items()}
        old = {name: known[key] for name, key in keys.items() if key in known}
        found = old | score(model, tokens, {name: v for name, v in variants.items() if name not in old}, **options)
        known.update({key: found[name] for name, key in keys.items() if key[1] is not None})
        return {name: found[name] for name in ('reference', *variants)}
    perplexity.evaluate = evaluate

def remember_probes(folder: Path): # where processes leave it for each other
    "What one sweep measured the next one takes: the same unit and format of the same model, rounded alike, on the same sequence"
    from optiq import sensitivity
    complete, measure = sensitivity._complete, sensitivity._measure_halved
    folder.mkdir(exist_ok=True)
    def completed(log, *args, **options):
        said = {k: v for k, v in log.header['fingerprint'].items() if k not in ('formats', 'tokens')}
        file = folder/digest(json.dumps(said, sort_keys=True).encode())
        known = {tuple(k): kl for *k, kl in json.loads(file.read_text())} if file.exists() else {}
        before = len(known)
        def measured(b, batch, todo, *args, many=None, **options):
            if not b.stacks: return measure(b, batch, todo, *args, many=many, **options)
            rows, probes = [digest(row.tobytes()) for row in batch], [(u.path, str(fmt)) for u, fmt in todo]
            lack = np.array([[(*probe, row) not in known for row in rows] for probe in probes]).reshape(len(probes), len(rows))
            for some in np.unique(lack, axis=0): # probes that lack the same sequences
                i, j = np.flatnonzero((lack == some).all(1)), np.flatnonzero(some)
                if not len(j): continue
                kl, many = measure(b, batch[j], [todo[k] for k in i], *args, many=many, **options)
                known.update({(*probes[k], rows[n]): float(kl[at, col]) for at, k in enumerate(i) for col, n in enumerate(j)})
            return np.array([[known[*probe, row] for row in rows] for probe in probes]), many
        sensitivity._measure_halved = measured
        try: return complete(log, *args, **options)
        finally:
            sensitivity._measure_halved = measure
            mine = file.with_suffix(f'.{os.getpid()}')
            if len(known) > before: mine.write_text(json.dumps([[*k, kl] for k, kl in known.items()])), mine.replace(file)
    sensitivity._complete = completed

def remember_answers(folder: Path): # where processes leave them for each other
    "`write` of PyTorch, with what the same weights wrote after the same prompt; a greedy text goes on as it began"
    from optiq.backends.torch import TorchBackend
    from optiq.evals import tasks # noqa: F401, which adds it
    write = TorchBackend.write
    folder.mkdir(exist_ok=True)
    def written(self, prompts, new_tokens, end, stop=(), make_cache=None):
        if stop or make_cache or not self.swapping <= self.checkpoint.unit.keys():
            return write(self, prompts, new_tokens, end, stop, make_cache)
        numbers = (x.detach().contiguous().flatten().view(self.xp.uint8).numpy() for x in self.model.state_dict().values())
        said = json.dumps([self.checkpoint.config, str(self.dtype), end], sort_keys=True, default=str)
        file = folder/f'answers-{digest(said.encode(), *numbers)}'
        known = json.loads(file.read_text()) if file.exists() else {}
        names = [digest(json.dumps(list(map(int, p))).encode()) for p in prompts]
        def has(name): # it ended, or went on for as long
            return name in known and (len(known[name][0]) < known[name][1] or known[name][1] >= new_tokens)
        lack = {n: p for n, p in zip(names, prompts) if not has(n)}
        if lack:
            known |= {n: (out, new_tokens) for n, out in zip(lack, write(self, [*lack.values()], new_tokens, end))}
            mine = file.with_suffix(f'.{os.getpid()}')
            mine.write_text(json.dumps(known)), mine.replace(file)
        return [known[n][0][:new_tokens] for n in names]
    TorchBackend.write = written
