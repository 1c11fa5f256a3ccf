"""Every rounding and every peer at the same true bytes, scored by one scorer: dequantized weights, float32, PyTorch.

    python3 bench/peers/ours.py --model MODEL --calibration valid.txt --test test.txt [--only PARTS] -o results.json
    python3 bench/peers/ours.py --merge a.json,b.json [--about trained=training.json] -o results.json

`uniform`  one format for all (min-max), mxfp4, nvfp4, mlx-lm's mixed recipes
`flat`     one format for all, rounded by search and by GPTQ as our plans are
`sweeps`   KL of every unit in every candidate, under each rounding; needed by `ours` and `dwq`
`ours`     plans at each target from each sweep, rounded as they were measured; with --alternatives plans of `search` saved with `gptq`
           as well, and plans of `gptq` with `minmax`
`dwq`      mlx-lm's dwq on our GPTQ plans
`dynamic`, `gptq`, `awq`, `tuned`  mlx-lm's dynamic_quant, gptq, awq, and dwq on uniform formats, called as libraries with our
           calibration tokens, on MLX's default device
`rates`    dwq on uniform formats over a grid of learning rates
`own`      dwq with its own number of samples, length and rate, and the rates of --own-rates: the calibration text as it comes, in rows of
           1,024 tokens, the last 32 held out, in one pass and in as many as make its 2,048 samples
`settings` dynamic_quant, awq and gptq over their own settings, given all sequences but the last eight, which are held out
           In these three each row has its KL on the held-out calibration text; `chosen` is a row that no other of the tool has beaten
           there at its size or below
`saved`    checkpoints that a tool has written already, such as jang's affine profiles; --saved NAME=FOLDER,… names them
`optiq`    mlx-optiq 0.7.7 with mlx-lm 0.32.0; --optiq FOLDER holds both unpacked wheels, see mlx_optiq.py

Results are written after each row, and a row that is there already is not measured again. All tools see the same calibration tokens;
the text that is scored is another file. A row's `kl_each` has a value per test sequence, so that differences can be tested pairwise.
"""
import argparse
import copy
import json
import os
import subprocess
import sys
import time
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from optiq.backends.torch import TorchBackend
from optiq.calibration import fingerprint, passages, token_batch
from optiq.convert import convert, stored_bytes
from optiq.evals.perplexity import evaluate, evaluation_tokens, overrides_of
from optiq.report import machine
from optiq.formats import AS_IS, quantize_minmax
from optiq.knapsack import allocate
from optiq.plan import make_plan, recipe, uniform
from optiq.models import Checkpoint
from optiq.polish import dwq
from optiq.rounding import as_overrides, round_model, round_to_files
from optiq.measure.sweep import Sweep
from optiq.sensitivity import kl_sweep

SWEPT = '2g32,2g64,3g32,3g64,4g32,4g64,5g64,6g64,8g64'

SETTINGS = ','.join([*(f'dynamic/{w}/{n}' for n in (120, 32) for w in ('4/8/6.0', '5/8/6.0', '4/6/5.0', '4/5/5.0', '3/6/4.5', '3/5/4.5', '3/5/4.0', '3/4/4.0')),
                     *(f'awq/{b}/6/{n}/{g}' for b in (4, 3) for n, g in ((120, 20), (120, 10), (120, 40), (32, 20))),
                     *(f'gptq/4/{n}/6/5/4' for n in (120, 32))])

class Bench:
    "What all parts share: model, tokens, and the file of results"
    def __init__(self, args):
        self.args, self.c = args, Checkpoint(args.model)
        self.b = TorchBackend(self.c)
        self.text = passages(args.calibration, 'all' if Path(args.calibration).is_file() else 'train')
        self.tokens = token_batch(self.text, self.c.tokenizer, args.n, args.seq_len)
        self.test = evaluation_tokens(args.test, self.c.tokenizer, args.test_n, 256, 'all' if Path(args.test).is_file() else 'test')
        self.targets, self.out = [float(t) for t in args.targets.split(',')], Path(args.output)
        about = dict(model=self.c.fingerprint, calibration=f'{args.n} × {args.seq_len} tokens, {fingerprint(self.tokens)}',
                     test=f'{args.test_n} × 256 tokens, {fingerprint(self.test)}', device=device(), command=' '.join(sys.argv), note=args.note, **machine())
        self.results = json.loads(self.out.read_text()) if self.out.exists() else dict(about=about, rows={}, seconds={})
        for k in ('model', 'calibration', 'test'):
            if self.results['about'][k] != about[k]: raise SystemExit(f'{self.out} was measured on another {k}; give another -o')

    @cached_property
    def data(self):
        "The calibration tokens for mlx-lm"
        import mlx.core as mx
        mx.set_cache_limit(2**33) # another process may need the memory
        return mx.array(self.tokens)

    def failed(self, name, e):
        self.results['rows'][name] = dict(failed=f'{type(e).__name__}: {str(e)[:300]}')
        self.save()
        print(name, 'failed:', type(e).__name__, str(e)[:200], flush=True)

    def missing(self, name): return name not in self.results['rows']

    def save(self): self.out.write_text(json.dumps(self.results, indent=1)+'\n')

    def row(self, name, size, variant, seconds, **more):
        "Score a variant (overrides, or a Backend) and write its row"
        self.write(name, size, evaluate(self.b, self.test[:self.args.score_n], {name: variant})[name], seconds, **more)

    def write(self, name, size, s, seconds, **more):
        "The row of a score"
        se = lambda x: float(x.std(ddof=1)/len(x)**.5) if len(x) > 1 else None
        self.results['rows'][name] = dict(true_bpw=size['true_bpw'], bytes=size['bytes'], kl=float(s.kl.mean()), kl_se=se(s.kl),
            kl_first16=float(s.kl[:16].mean()), perplexity=s.perplexity, perplexity_se=s.perplexity_se, flips=1-float(s.agree.mean()),
            flips_se=se(s.agree), seconds=seconds, sequences=len(s.kl), kl_each=[float(f'{x:.6g}') for x in s.kl]) | more
        self.save()
        print(f'{name:44} {size["true_bpw"]:.3f} bits  KL {s.kl.mean():.4f} ± {se(s.kl) or 0:.4f}  (first 16: {s.kl[:16].mean():.4f})  '
              f'perplexity {s.perplexity:.2f}  flips {1-s.agree.mean():.1%}  {seconds or 0:.1f} s', flush=True)

    def reference(self):
        if self.missing('reference'): self.row('reference', of_plan(make_plan(self.c, {})), {}, 0)

def device():
    import torch
    return torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'

def of_plan(plan): return dict(true_bpw=plan.true_bpw, bytes=plan.nbytes)

def timed(f):
    start = time.perf_counter()
    out = f()
    wait()
    return out, time.perf_counter()-start

def wait():
    import torch
    if torch.cuda.is_available(): torch.cuda.synchronize()

def part_uniform(x):
    plans = {}
    for f in ('2g64', '3g32', '3g64', '3g128', '4g32', '4g64', '4g128', '5g32', '5g64', '6g64', '8g64', 'mxfp4', 'nvfp4', 'mxfp8'):
        plans[f'uniform {f}'] = uniform(x.c, f)
    for name in ('mixed_2_6', 'mixed_3_4', 'mixed_3_6', 'mixed_4_6'):
        try: plans[f'mlx-lm {name}'] = recipe(x.c, name)
        except ValueError as e: print(name, e)
    for name, plan in plans.items():
        left = sum(f == AS_IS for f in plan.values())
        if x.missing(name): x.row(name, of_plan(plan), overrides_of(plan), 0, left_as_is=left)

def part_flat(x):
    "Uniform widths, rounded as our plans are: what is left of the difference is what the allocation brings"
    for rounding in (r for r in x.args.roundings.split(',') if r != 'minmax'): # min-max is `uniform`
        todo = [f for f in x.args.flat.split(',') if x.missing(flat_name(f, rounding))]
        at_once = 1 if rounding == 'gptq' else len(todo) # each call scores the reference too, and gptq takes longer than that
        for some in (todo[k:k+at_once] for k in range(0, len(todo), at_once or 1)):
            plans = {flat_name(f, rounding): uniform(x.c, f) for f in some}
            made = {n: timed(lambda p=p: dict(round_model(x.b, x.tokens, p, rounding))) for n, p in plans.items()}
            found = evaluate(x.b, x.test[:x.args.score_n], {n: as_overrides(done) for n, (done, _) in made.items()})
            for n, (_, s) in made.items(): x.write(n, of_plan(plans[n]), found[n], s)

def flat_name(fmt, rounding): return f'uniform {fmt} {rounding}'

def sweep_of(x, rounding):
    "The sweep under this rounding, from its file if it is there"
    of = Path(x.args.sweeps_of or x.out)
    file = of.with_name(f'{of.stem}-{rounding}.sweep.jsonl')
    if x.args.sweeps_of: return Sweep.load(file)
    sweep, s = timed(lambda: kl_sweep(x.b, x.tokens[:x.args.sweep_n], x.args.formats.split(','), rounding=rounding,
                                      rounding_tokens=x.tokens, out=file, progress=False))
    if f'sweep {rounding}' not in x.results['seconds']:
        x.results['seconds'][f'sweep {rounding}'] = s
        x.save()
        print(f'sweep {rounding}: {s:.1f} s', flush=True)
    return sweep

def part_sweeps(x):
    for rounding in x.args.roundings.split(','): sweep_of(x, rounding)

def part_ours(x):
    for rounding in x.args.roundings.split(',')[::-1]: # the best first
        sweep = sweep_of(x, rounding)
        for t in x.targets:
            try: plan = allocate(sweep, true_bpw=t)
            except ValueError as e: print(rounding, t, e); continue
            other = dict(gptq=['minmax'], search=['gptq']).get(rounding, []) if x.args.alternatives else []
            for way in [rounding, *other]:
                name = f'ours {t:g} {rounding}'+('' if way == rounding else f', saved with {way}')
                if not x.missing(name): continue
                done, s = timed(lambda: dict(round_model(x.b, x.tokens, plan, way)))
                x.row(name, of_plan(plan), as_overrides(done), s, predicted_kl=plan.predicted_kl,
                      counts={str(f): n for f, n in plan.counts().items()}, embed=str(plan[x.c.units[0].path]))
                del done

def part_dynamic(x):
    "mlx-lm's dynamic_quant: one estimate for each pair of widths, then a threshold for each target"
    for low, high, target in x.args.dynamic: attempt(x, f'mlx-lm dynamic_quant {low}/{high} at {target:g}', dynamic(x, low, high, target))

def dynamic(x, low, high, target, n=None, found={}): # sequences ▸ function that makes the model
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold
    from mlx_lm.utils import quantize_model
    g = 64
    def made():
        model = x.c.load()
        if (low, high, n) not in found: found[low, high, n] = dict(estimate_sensitivities(model, x.data[:n], low, g, high, g))
        scores = found[low, high, n]
        edge = estimate_threshold(model, scores, target_bpw=target, low_bits=low, low_group_size=g, high_bits=high, high_group_size=g)
        rule = lambda p, m: hasattr(m, 'to_quantized') and (dict(bits=high, group_size=g) if scores[p] > edge else True)
        model, q = quantize_model(model, copy.deepcopy(x.c.config), group_size=g, bits=low, quant_predicate=rule)
        return model, q['quantization']
    return made

def part_gptq(x):
    "mlx-lm's gptq; the embedding, which it leaves to min-max, at several widths from one run"
    for bits, widths in ((4, (6, 5, 4)), (2, (6, 4))):
        made = gptq(x, bits)
        for width in widths: attempt(x, f'mlx-lm gptq {bits}g64, embedding {width}g64', lambda width=width: made(width))

def gptq(x, bits, n=None): # sequences ▸ function of the embedding's width
    from mlx_lm.quant.gptq import gptq_quantize
    kept = {}
    def made(width):
        if not kept:
            model = x.c.load()
            kept['embed'] = model.model.embed_tokens
            kept['model'] = gptq_quantize(model, x.data[:n], bits, 64, width, 64)[0]
        kept['model'].model.embed_tokens = kept['embed'].to_quantized(group_size=64, bits=width)
        return kept['model'], None
    return made

def part_awq(x):
    for bits, embed in ((4, 6), (3, 6), (4, 4), (3, 4)): attempt(x, f'mlx-lm awq {bits}g64, embedding {embed}g64', awq(x, bits, embed))

def awq(x, bits, embed, n=None, grid=20): # sequences, steps of its search ▸ function that makes the model
    from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize
    def made():
        model = x.c.load()
        awq_quantize(model, x.data[:n], AWQ_MODEL_CONFIGS[x.c.config['model_type']], 64, bits, 64, embed, grid)
        return model, None
    return made

def part_settings(x):
    "The three tools over --settings; what they choose by is the rest of the calibration text"
    held = x.tokens[-8:]
    for tool, *s in (w.split('/') for w in x.args.settings.split(',')):
        s = [float(v) if '.' in v else int(v) for v in s]
        if tool == 'dynamic': attempt(x, 'mlx-lm dynamic_quant, {}/{} at {:g}, {} sequences'.format(*s), dynamic(x, *s), held)
        if tool == 'awq': attempt(x, 'mlx-lm awq, {}g64, embedding {}g64, {} sequences, grid of {}'.format(*s), awq(x, *s), held)
        if tool == 'gptq':
            bits, n, *widths = s
            made = gptq(x, bits, n)
            for w in widths: attempt(x, f'mlx-lm gptq, {bits}g64, embedding {w}g64, {n} sequences', lambda w=w: made(w), held)
    choose(x.results['rows'])
    x.save()

def part_tuned(x):
    "mlx-lm's dwq on uniform formats"
    for fmt in ('4g64', '5g64', '3g64', '4g32', '3g32'): polished(x, f'mlx-lm dwq {fmt}', uniform(x.c, fmt))

def part_rates(x):
    "mlx-lm's dwq over learning rates; the best is that with the least KL on calibration text that it did not train on"
    for fmt in x.args.rate_formats.split(','):
        names = {f'mlx-lm dwq {fmt}, rate {r:g}': r for r in map(float, x.args.rates.split(','))}
        for name, rate in names.items(): polished(x, name, uniform(x.c, fmt), rate=rate, held=x.tokens[-8:])
    choose(x.results['rows'])
    x.save()

def part_own(x):
    "mlx-lm's dwq with its own samples and length, as far as the text goes; it holds 32 of them out"
    samples, length, valid = x.args.own_samples, 1024, 32
    rows = token_batch(x.text, x.c.tokenizer, samples, length, fewer=True)
    for spec in x.args.own_rates.split(','):
        fmt, rate, passes = spec.split('/')
        passes = int(passes) or -(-samples//(len(rows)-valid))
        name = f'mlx-lm dwq {fmt} own, rate {float(rate):g}, {passes} pass{"es"*(passes > 1)}'
        polished(x, name, uniform(x.c, fmt), rate=float(rate), held=rows[-valid:], tokens=rows, epochs=passes, valid=valid)
    choose(x.results['rows'])
    x.save()

def choose(rows):
    "Of the settings that were tried with a tool, or on a format, those that no other beats on held-out calibration text in no more bytes"
    tried = {n: r for n, r in rows.items() if 'held_kl' in r}
    for n, r in tried.items():
        others = [o for m, o in tried.items() if m.split(',')[0] == n.split(',')[0] and o['bytes'] <= r['bytes']]
        r['chosen'] = r['held_kl'] == min(o['held_kl'] for o in others)

def part_optiq(x):
    "mlx-optiq in its own environment, on the sequences that our sweeps measure on"
    folder = x.out.with_name('mlx-optiq')
    tokens = x.out.with_name('tokens.json')
    tokens.write_text(json.dumps(x.tokens[:x.args.sweep_n].tolist()))
    plans = x.args.optiq_plans.split(';')
    if any(x.missing(f'mlx-optiq {p}') for p in plans):
        env = os.environ | dict(PYTHONPATH=os.pathsep.join([x.args.optiq, os.environ.get('MLX_SITE', '')]), HF_HUB_OFFLINE='1')
        subprocess.run([sys.executable, Path(__file__).with_name('mlx_optiq.py'), x.c.folder.resolve(), tokens, folder, *plans], env=env, check=True,
                       stdout=subprocess.DEVNULL)
    for p in plans:
        about = json.loads((folder/p.replace(':', '-')/'peer.json').read_text())
        if x.missing(f'mlx-optiq {p}'): score_saved(x, f'mlx-optiq {p}', folder/p.replace(':', '-'), about.pop('seconds'), **about)

def part_saved(x):
    "What other tools wrote; a folder that mlx-lm does not open is a row that says so"
    for name, folder in (pair.split('=') for pair in x.args.saved.split(',')):
        if not x.missing(name): continue
        try: score_saved(x, name, folder, None)
        except Exception as e: x.failed(name, e)

def attempt(x, name, make, held=None):
    "Make a model, save it, and score what was saved; a peer that fails is a row that says so"
    if not x.missing(name): return
    print('…', name, flush=True)
    try: (model, entries), s = timed(make)
    except Exception as e: return x.failed(name, e)
    with TemporaryDirectory() as d: score_saved(x, name, save_mlx(x, model, entries, d), s, held)

def save_mlx(x, model, entries, folder):
    "Write an mlx-lm model; its entries are read off its layers if they are not known"
    from mlx_lm.utils import save_config, save_model
    if entries is None:
        layers = {k: dict(group_size=m.group_size, bits=m.bits, mode=m.mode) for k, m in model.named_modules() if 'scales' in m}
        entries = next(iter(layers.values())) | layers
    save_model(folder, model)
    save_config(x.c.config | dict(quantization=entries, quantization_config=entries), Path(folder)/'config.json')
    return folder

def score_saved(x, name, folder, seconds, held=None, **more):
    from mlx_lm.utils import compute_bits_per_weight
    saved = Checkpoint(folder)
    size = dict(true_bpw=8*stored_bytes(saved)/x.c.params, bytes=stored_bytes(saved))
    more |= dict(mlx_lm_bits=float(compute_bits_per_weight(saved.load())), file_bytes=sum(f.stat().st_size for f in saved.files))
    if held is not None: more |= dict(held_kl=float(evaluate(x.b, held, {name: TorchBackend(saved)})[name].kl.mean()))
    x.row(name, size, TorchBackend(saved), seconds, **more)

def polished(x, name, plan, quantizer=quantize_minmax, rate=None, held=None, tokens=None, epochs=None, **options):
    "Write a plan, train its scales and biases with mlx-lm's dwq, and score what was saved"
    if not x.missing(name): return
    print('…', name, flush=True)
    rate, epochs, tokens = rate or x.args.learning_rate, epochs or x.args.epochs, x.tokens if tokens is None else tokens
    with TemporaryDirectory() as d:
        convert(x.c, plan, Path(d)/'model', quantizer=quantizer)
        try: _, s = timed(lambda: dwq(Path(d)/'model', x.c, tokens, epochs=epochs, learning_rate=rate, **options))
        except Exception as e: return x.failed(name, e)
        score_saved(x, name, Path(d)/'model', s, held, epochs=epochs, learning_rate=rate, trained_on=list(tokens.shape))

def part_dwq(x):
    "dwq on our plans, rounded as before"
    for t in x.targets:
        name = f'ours {t:g} gptq + dwq'
        if not x.missing(name): continue
        try: plan = allocate(sweep_of(x, 'gptq'), true_bpw=t)
        except ValueError as e: print(name, e); continue
        with TemporaryDirectory() as d: polished(x, name, plan, round_to_files(x.b, x.tokens, plan, 'gptq', d, progress=False))

def merge(out, files, more):
    "One results file of several that were scored on the same text; where they differ in what else matters, each row says what it was made with"
    parts = [json.loads(Path(f).read_text()) for f in files]
    for k in ('model', 'test'):
        if len({p['about'][k] for p in parts}) > 1: raise SystemExit(f'the files differ in {k}')
    about = parts[0]['about'] | dict(command=[c for p in parts for c in listed(p['about']['command'])])
    for k in ('calibration', 'device', 'python', 'torch', 'transformers', 'cpu', 'cores', 'note', 'date'):
        found = [str(p['about'].get(k, '')) for p in parts]
        if len(set(found)) == 1: continue
        about[k] = together(found)
        if k in ('calibration', 'device'):
            for p in parts:
                for r in p['rows'].values(): r.setdefault(k, p['about'][k])
    rows, seconds = ({k: v for p in parts for k, v in p[part].items()} for part in ('rows', 'seconds'))
    choose(rows)
    about |= {k: json.loads(Path(f).read_text()) for k, f in (m.split('=') for m in more.split(',') if m)}
    Path(out).write_text(json.dumps(dict(about=about, rows=rows, seconds=seconds), indent=1, ensure_ascii=False)+'\n')

def our_rows(rows, rounding): # by size; a plan saved with another rounding is none of them
    return sorted((r for n, r in rows.items() if n.startswith('ours ') and n.split()[2:] == [rounding]), key=lambda r: r['true_bpw'])

def together(texts): return '; '.join(dict.fromkeys(part for t in texts for part in t.split('; ') if part))

def listed(x): return x if isinstance(x, list) else [x]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='demo')
    p.add_argument('--calibration', default='bundled')
    p.add_argument('--test', default='bundled')
    p.add_argument('--only', default='uniform,ours,dynamic,gptq,awq,tuned,dwq')
    p.add_argument('--targets', default='6.569,6,5,4.5,4,3.5,3', help='true bits per weight; 6.569 is Q6_K of llama.cpp')
    p.add_argument('--formats', default=SWEPT, help='candidates of the sweeps')
    p.add_argument('--roundings', default='minmax,search,gptq')
    p.add_argument('--n', type=int, default=128, help='calibration sequences')
    p.add_argument('--seq-len', type=int, default=256)
    p.add_argument('--sweeps-of', help='results of another run whose sweeps serve here too, such as one with less text to round with')
    p.add_argument('--sweep-n', type=int, default=4, help='of these, sequences that the sweeps measure KL on')
    p.add_argument('--test-n', type=int, default=64, help='test sequences of 256 tokens')
    p.add_argument('--score-n', type=int, default=64, help='of these, how many are scored')
    p.add_argument('--epochs', type=int, default=2, help='of dwq')
    p.add_argument('--learning-rate', type=float, default=1e-5, help='of dwq')
    p.add_argument('--rates', default='1e-7,1e-6,3e-6,1e-5,3e-5,1e-4', help='of dwq; 1e-6 is its own')
    p.add_argument('--rate-formats', default='3g64,4g64,5g64', help='of the models whose rates are tried')
    p.add_argument('--own-rates', default='4g64/1e-6/1,4g64/1e-6/0,4g64/3e-5/0,3g64/1e-6/0,3g64/3e-4/0,5g64/1e-6/0,5g64/1e-5/0',
                   help='format/rate/passes of `own`; 0 passes are as many as make its samples')
    p.add_argument('--own-samples', type=int, default=2048, help='of `own`')
    p.add_argument('--settings', default=SETTINGS, help='dynamic/low/high/target/sequences, awq/bits/embedding/sequences/grid, '
                   'gptq/bits/sequences/embedding/embedding…')
    p.add_argument('--dynamic', default='4/8/6,4/5/5,4/8/5,3/5/4.5,3/5/4,2/4/3.5,2/4/3', help='dynamic_quant: low/high/target, comma separated')
    p.add_argument('--optiq', help='folder of unpacked wheels: mlx-optiq 0.7.7 and mlx-lm 0.32.0')
    p.add_argument('--optiq-plans', default='5:4,8;4.5:4,6;4.2:4,5;4:3,5;3.5:3,4;3:2,4', help="target:candidate bits, as mlx-optiq's options")
    p.add_argument('--flat', default='4g64,3g64,5g64,6g64', help='uniform formats that are rounded as our plans are')
    p.add_argument('--saved', default='', help='NAME=FOLDER of checkpoints, comma separated')
    p.add_argument('--note', default='', help='kept with the results')
    p.add_argument('--merge', help='result files to join, comma separated')
    p.add_argument('--about', default='', help='NAME=FILE of JSON, comma separated: what --merge adds to what it says of the run, such as how the model was trained')
    p.add_argument('--alternatives', action='store_true')
    p.add_argument('-o', '--output', default='peers.json')
    args = p.parse_args()
    if args.merge: return merge(args.output, args.merge.split(','), args.about)
    args.dynamic = [(int(a), int(b), float(t)) for a, b, t in (d.split('/') for d in args.dynamic.split(','))]
    x = Bench(args)
    x.reference()
    for part in args.only.split(','):
        _, s = timed(lambda: globals()[f'part_{part}'](x))
        x.results['seconds'][part] = s
        x.save()
        print(f'== {part}: {s:.0f} s', flush=True)

if __name__ == '__main__': main()
