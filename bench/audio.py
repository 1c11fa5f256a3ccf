"""What mixed precision costs and buys in a speech model: KL to full precision and word error rate, on clips held out.

    python bench/speak.py TEXT -n 8 -o SPOKEN
    python bench/audio.py --model MODEL --clips FOLDER --spoken SPOKEN [--again] -o results.json

`fidelity`  full precision in mlx-audio and in transformers, float32, greedy: transcripts and word error rate of both
`uniform`   8, 4 and 3 bits, the decoder alone (the encoder left as it is) and encoder included
`sweep`     KL that quantizing each tensor alone causes (min-max), per clip: the decoder at 3, 4 and 5 bits, the encoder at 4
`optiq`     at no more bytes than uniform 4 bits, cross-validated: formats chosen and codes rounded (gptq) on some clips,
            scored on the others, in turn. The KL at 4 bits is carried to other formats by the squared error weighted with the
            inputs, to which it is proportional where _errors are small. The decoder is rounded on synthesised speech as well:
            four clips have a hundred tokens, fewer than a matrix has inputs. Nothing is scored on it
`saved`     one of these models, converted, opened by mlx-audio in a process of its own
`decoder`   the decoder alone at several sizes, with each rounding, cross-validated likewise

Every part is written when it is done, and one that is there is not done again; with --again the rows that
`gptq` rounds are, and each says on which day. On a Linux CPU preload OpenBLAS: MLX's own
BLAS is twenty times slower.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import numpy as np
import soundfile

from optiq.families.audio import speech_samples, transcribe
from optiq.backends.open import open_backend
from optiq.convert import convert
from optiq.evals.perplexity import evaluate, overrides_of
from optiq.report import machine, mean_figure
from optiq.evals.wer import _errors, _wer_figure, write_down
from optiq.formats import AS_IS, Format, parse_format, quantize_dequantize
from optiq.knapsack import allocate
from optiq.plan import make_plan
from optiq.rounding import as_overrides, round_model
from optiq.statistics import Statistics
from optiq.measure.kl import measure
from optiq.measure.sweep import Sweep
from optiq.material.speech import RATE, clips

PLAIN = """import json, sys
import numpy as np, mlx.core as mx, soundfile
from mlx_audio.stt import load
model = load({folder!r})
model.set_dtype(mx.float32)
model.dtype = mx.float32
def written(file):
    x, rate = soundfile.read(file, dtype='float32') # at 16 kHz: mlx-audio's own reader needs ffmpeg for .ogg
    return model.generate(mx.array(np.pad(x, (0, 480000-len(x)))), temperature=0., sample_len=224, return_timestamps=False, fp16=False).text.strip()
assert 'optiq' not in sys.modules
print(json.dumps([written(f) for f in {files}]))"""

FOUR = Format(4, 64)
FOLDS = [[0, 5], [1, 3], [2, 4]]
CARRIED = '3g64 4g128 4g64 4g32 5g128 5g64 6g64 8g64'.split() # _errors at 2 bits are not small

def heard_by_transformers(folder, heard):
    "Greedy transcripts of transformers"
    import torch
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, PreTrainedTokenizerFast
    torch.set_num_threads(1)
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    extract, tokenizer = WhisperFeatureExtractor.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    def listen(clip):
        x = extract(clip.audio, sampling_rate=RATE, return_tensors='pt').input_features
        with torch.no_grad(): ids = model.generate(x, max_new_tokens=220)[0]
        return tokenizer.decode(ids, skip_special_tokens=True).strip()
    return write_down(listen, heard)

def figures(done, kl=None):
    "Word error rate, KL and what was written"
    w = _wer_figure(done)
    out = {k: v for k, v in w.items() if k.startswith('wer')} | dict(
        errors=sum(map(_errors, done)), words=sum(r['words'] for r in done), written=[r['response'] for r in done])
    if kl is None: return out
    k = mean_figure('kl', kl)
    return out | {n: v for n, v in k.items() if n.startswith('kl')} | dict(kl_by_clip=[float(f'{v:.5g}') for v in kl])

class Bench:
    def __init__(self, args):
        self.args, self.out = args, Path(args.output)
        self.found = json.loads(self.out.read_text()) if self.out.exists() else {}
        self.heard = clips(args.clips, 'all')
        self.b = open_backend(args.model)
        self.c, self.samples = self.b.checkpoint, speech_samples(self.b.model, self.heard)
        self.b.model.dtype = mx.float32
        self.spoken = speech_samples(self.b.model, clips(args.spoken, 'all')) if args.spoken else []

    def save(self, key, value):
        self.found[key] = value
        self.out.write_text(json.dumps(self.found, indent=1, ensure_ascii=False)+'\n')
        print(key, flush=True)

    def score(self, overrides, which): # indices of clips ▸ KL of each, what was written
        "KL on the transcript, and the greedy transcript"
        kl = evaluate(self.b, [self.samples[i] for i in which], {'it': overrides})['it'].kl
        with self.b.swapped(overrides): done = write_down(lambda c: transcribe(self.b.model, c.audio), [self.heard[i] for i in which])
        return list(kl), done

    def day(self): # when the rows of gptq were measured again, if they were
        return self.found['about'].get('again', {}).get('date')

    def sizes(self, plan): return dict(nominal_bpw=plan.nominal_bpw, true_bpw=plan.true_bpw, size_mb=plan.size_mb, bytes=plan.nbytes)

    def of_scope(self, scope, fmt): # uniform
        return make_plan(self.c, {u.path: AS_IS if scope == 'decoder' and u.part == 'encoder' else fmt for u in self.c.units}, f'uniform {fmt}')

    def fidelity(self):
        full = write_down(lambda c: transcribe(self.b.model, c.audio), self.heard)
        torch = heard_by_transformers(self.args.model, self.heard)
        same = sum(a['response'] == b['response'] for a, b in zip(full, torch))
        self.save('fidelity', dict(clips=len(full), same_transcripts=same, mlx_audio=figures(full), transformers=figures(torch),
                                   **self.sizes(make_plan(self.c, self.c.formats))))

    def uniform(self, widths=(4, 8, 3)):
        rows = self.found.get('uniform', [])
        for bits in widths:
            for scope in ('all', 'decoder'):
                if any((r['scope'], r['bits']) == (scope, bits) for r in rows): continue
                plan = self.of_scope(scope, Format(bits, 64))
                kl, done = self.score(overrides_of(plan), range(len(self.heard)))
                rows.append(dict(scope=scope, bits=bits, name=f'uniform {bits} bits', **self.sizes(plan), **figures(done, kl)))
                self.save('uniform', rows)

    def sweep(self):
        start, rows = time.perf_counter(), self.found.get('sweep', dict(rows=[]))['rows']
        have = {(r['unit'], r['format']) for r in rows}
        wanted = [(u, Format(k, 64)) for part, bits in (('decoder', (3, 4, 5)), ('encoder', (4,))) for k in bits
                  for u in self.c.units if u.part == part]
        todo = [(u, f) for u, f in wanted if (u.path, str(f)) not in have]
        for k in range(0, len(todo), 12):
            for (u, f), v in zip(todo[k:k+12], measure(self.b, self.samples, todo[k:k+12])):
                rows.append(dict(unit=u.path, part=u.part, kind=u.kind, block=u.block, format=str(f), params=u.params, kl=[float(f'{x:.4g}') for x in v]))
            self.save('sweep', dict(rounding='minmax', seconds=time.perf_counter()-start, rows=rows))

    def errors_of(self, stats): # path ▸ format ▸ squared error, weighted with the inputs, over that at 4 bits
        found = {}
        for u in sorted(self.c.units, key=lambda u: u.block is None): # what the last states say comes last
            w, a = self.b.unit_weight(u.path), stats[u.path].importance()
            e = {f: float((a*(w-quantize_dequantize(w, parse_format(f))).astype(mx.float32)**2).sum()) for f in CARRIED if u.takes(parse_format(f))}
            found[u.path] = {f: float(f'{x/e[str(FOUR)]:.4g}') for f, x in e.items()}
        return found

    def carried(self, kl, _errors): # both by path ▸ Sweep
        values = {(p, parse_format(f)): np.array(kl[p])*e for p, found in _errors.items() for f, e in found.items()}
        return Sweep(self.c.units, [parse_format(f) for f in CARRIED], values,
                     dict(model=self.c.name, params=self.c.params, other_bytes=self.c.other_bytes))

    def plan(self, sweep, max_bytes, encoder): # whether the encoder may change
        return allocate(sweep, max_bytes=max_bytes, formats=sweep.formats+[AS_IS],
                        protect=() if encoder else [u.path for u in self.c.units if u.part == 'encoder'])

    def folds(self): # indices of clips that are held out together
        n = len(self.heard)
        return FOLDS if n == 6 else [[*range(k, n, 3)] for k in range(3)]

    def rounded(self, clips, spoken, plan, method): # ▸ path ▸ Rounded
        "The encoder on clips, which have 1,500 frames each; the decoder, given that encoder, on synthesised speech as well"
        part = lambda name: {u.path: plan[u.path] if u.part == name else AS_IS for u in self.c.units}
        encoder = dict(round_model(self.b, clips, part('encoder'), method)) if any(f != AS_IS for f in part('encoder').values()) else {}
        with self.b.swapped(as_overrides(encoder)): return encoder | dict(round_model(self.b, clips+spoken, part('decoder'), method))

    def learned(self, held): # Sweep, (clips, spoken)
        learn = [i for i in range(len(self.heard)) if i not in held]
        _errors, key, mine = self.found.get('errors', {}), ' '.join(map(str, learn)), [self.samples[i] for i in learn]
        if key not in _errors:
            _errors[key] = self.errors_of(Statistics(self.b, mine, whole=False))
            self.save('errors', _errors)
        kl = {r['unit']: np.array(r['kl'])[learn] for r in self.found['sweep']['rows'] if r['format'] == str(FOUR)}
        return self.carried(kl, _errors[key]), (mine, self.spoken)

    def optiq(self, cap, encoder): # at the bytes of uniform 4 bits in which scope; whether the encoder may change
        name = 'optiq, gptq'+', encoder too'*(encoder and cap == 'decoder')
        mine = lambda r: (r['scope'], r['name']) == (cap, name)
        parts = [p for p in self.found.get('folds', []) if not mine(p) or p.get('again') == self.day()]
        for held in self.folds():
            if any(mine(p) and p['held'] == held for p in parts): continue
            start, (sweep, samples) = time.perf_counter(), self.learned(held)
            plan = self.plan(sweep, self.of_scope(cap, FOUR).nbytes, encoder)
            rounded = self.rounded(*samples, plan, 'gptq')
            took = time.perf_counter()-start
            kl, done = self.score(as_overrides(rounded), held)
            parts.append(dict(scope=cap, name=name, held=held, kl=[float(k) for k in kl], done=done,
                              counts={str(f): k for f, k in plan.counts().items()}, embedding=str(plan['decoder.token_embedding']),
                              predicted_kl=plan.predicted_kl, seconds=took, again=self.day(), **self.sizes(plan)))
            self.save('folds', parts)
            if (cap, encoder, held) == ('decoder', True, self.folds()[0]): self.saved(plan, rounded, held, done)
        others = [r for r in self.found.get('optiq', []) if not mine(r)]
        heard = f'{len(self.heard)-len(self.folds()[0])} clips'+'; the decoder also on synthesised speech'*bool(self.spoken)
        self.save('optiq', others+[dict(name=name, rounded_on=heard, again=self.day()) | self.joined([p for p in parts if mine(p)], cap)])

    def saved(self, plan, rounded, held, done): # by mlx-audio alone, in a process of its own
        with TemporaryDirectory() as folder:
            out = Path(folder)/'whisper'
            convert(self.c, plan, out, quantizer={p: lambda w, fmt, r=r: r.stored() for p, r in rounded.items()}) # and checked
            files = [str(out.parent/f'{i}.wav') for i in held]
            for i, file in zip(held, files): soundfile.write(file, self.heard[i].audio, RATE, subtype='FLOAT')
            code = PLAIN.format(folder=str(out), files=files)
            env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
            ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, cwd=folder)
            if ran.returncode: raise RuntimeError(f'mlx-audio alone: {ran.stderr[-2000:]}')
            written, size = json.loads(ran.stdout.splitlines()[-1]), sum(f.stat().st_size for f in out.glob('*.safetensors'))
        self.save('saved', dict(name='optiq, gptq, encoder too', scope='decoder', held=held, file_bytes=size, planned_bytes=plan.nbytes, clips=len(written),
                                same_transcripts=sum(a == r['response'] for a, r in zip(written, done)), written=written))

    def decoder_table(self, sizes): # true bits of the decoder's matrices; the encoder as it is
        rows, decoder = self.found.get('decoder', []), [u for u in self.c.units if u.part == 'decoder']
        rest, params = self.of_scope('all', AS_IS).nbytes-sum(u.nbytes(AS_IS) for u in decoder), sum(u.params for u in decoder)
        for bits in sizes:
            for rounding in ('minmax', 'search', 'gptq'):
                same = lambda r: (r['bits'], r['rounding']) == (bits, rounding)
                if any(same(r) and (rounding != 'gptq' or r.get('again') == self.day()) for r in rows): continue
                start, kl, true = time.perf_counter(), {}, []
                for held in self.folds():
                    sweep, samples = self.learned(held)
                    plan = self.plan(sweep, rest+int(bits*params/8), False)
                    rounded = as_overrides(self.rounded(*samples, plan, rounding))
                    kl |= dict(zip(held, map(float, evaluate(self.b, [self.samples[i] for i in held], {'it': rounded})['it'].kl)))
                    true.append((plan.nbytes-rest)*8/params)
                by_clip = [kl[i] for i in sorted(kl)]
                k = mean_figure('kl', by_clip)
                rows = [r for r in rows if not same(r)]
                rows.append(dict(bits=bits, rounding=rounding, again=self.day() if rounding == 'gptq' else None, true_bpw=max(true), seconds=time.perf_counter()-start,
                                 kl=k['kl'], kl_se=k['kl_se'], kl_by_clip=[float(f'{v:.5g}') for v in by_clip]))
                self.save('decoder', rows)

    def against(self, scope, kl): # uniform 4 bits, min-max
        four = next(r for r in self.found['uniform'] if (r['scope'], r['bits']) == (scope, 4))
        d = np.subtract(four['kl_by_clip'], kl)
        return dict(ratio_to_uniform_4=float(np.mean(kl)/four['kl']), gain=float(d.mean()), gain_se=float(d.std(ddof=1)/len(d)**.5),
                    uniform_4_bytes=four['bytes'])

    def joined(self, parts, scope):
        "The clips of all folds, each scored by a model that never heard it"
        by = {i: (k, d) for p in parts for i, k, d in zip(p['held'], p['kl'], p['done'])}
        kl, done = zip(*(by[i] for i in sorted(by)))
        sizes = {k: max(p[k] for p in parts) for k in ('nominal_bpw', 'true_bpw', 'size_mb', 'bytes')}
        return dict(scope=scope, **sizes, **figures(list(done), list(kl)), **self.against(scope, kl))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', required=True)
    p.add_argument('--clips', required=True)
    p.add_argument('--spoken', help='synthesised speech, to round on as well')
    p.add_argument('--sizes', default='4.5,3.5,6,4,5', help='true bits of the decoder, for the part of that name')
    p.add_argument('-o', '--output', required=True)
    p.add_argument('--again', action='store_true', help='measure the rows of gptq once more')
    args = p.parse_args()
    bench = Bench(args)
    command = ' '.join(['python bench/audio.py', *(Path(a).name if a.startswith('/') else a for a in sys.argv[1:])])
    if 'about' not in bench.found: bench.save('about', dict(
        **machine(), blas='OpenBLAS, preloaded, one thread' if 'openblas' in os.environ.get('LD_PRELOAD', '') else "MLX's own", command=command,
        spoken=f'{len(bench.spoken)} clips, {sum(int(s["scored"].sum()) for s in bench.spoken)} tokens, by bench/speak.py', model=f'{Path(args.model).name}, {bench.c.params:,} parameters',
        computed='float32, weights after the round trip', clips=[dict(name=c.name, seconds=round(c.seconds, 1), said=c.text,
        scored=int(s['scored'].sum())) for c, s in zip(bench.heard, bench.samples)]))
    if 'fidelity' not in bench.found: bench.fidelity()
    if args.again: bench.save('about', bench.found['about'] | dict(again=dict(command=command, **machine())))
    bench.uniform([4])
    bench.sweep()
    for cap, encoder in (('decoder', True), ('all', True), ('decoder', False)): bench.optiq(cap, encoder)
    bench.uniform()
    bench.decoder_table([float(k) for k in args.sizes.split(',') if k])

if __name__ == '__main__': main()
