"""How well does the roofline predict decode speed? Random weights at the shapes of Qwen3, on this machine.

    python bench/latency.py -o latency.json [--shapes 0.6B,1.7B,8B,14B] [--bits 3,4,6,8] [--rounds 40] [--contexts 2048] [--drawn 10]
    python bench/latency.py --from latency.json [MORE.json …] [-o together.json]

The first measures: the chip (bandwidth, overheads, matrix-vector products for every format and shape), then the decode speed of
every plan of every shape, in many short rounds, so that drift hits all plans alike, and the time of a block on the device alone.
Then it predicts, with one calibration point per shape, and prints the tables: for the median of the rounds, and for the fastest
one, which is nearest to a machine that nothing else disturbs. The second predicts again from what files hold, several of one chip
together, without a machine. Every part is written when it is done, with all single times. It takes about 5 minutes on an H100, of which one
compiles kernels; on a Mac name the shapes that fit: `python bench/latency.py -o mac.json --shapes 0.6B,1.7B`.

`--shapes tiny` is for trying it out on a CPU.
"""
import argparse
import gc
import json
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from optiq.report import machine
from optiq.formats import Format
from optiq.plan import make_plan, uniform
from optiq.chips import Speed, _decode_once, _extend, _keep_busy, _measure_chip, _on_gpu, _per_step, _stand_in
from optiq.latency import _LEARNED, compare_speeds
from optiq.roofline import Chip, Latency, reads_of, skeleton
from optiq.material.configs import hub_config

CALIBRATION = 'uniform 4g64'

QWEN3_14B = dict(hidden_size=5120, intermediate_size=17408, num_hidden_layers=40, max_window_layers=40, num_attention_heads=40,
                 num_key_value_heads=8, vocab_size=151936, max_position_embeddings=40960, tie_word_embeddings=False)

def config_of(shape):
    "config.json of a shape of Qwen3; 'tiny' for the small one of the tests"
    return hub_config('qwen3', {'tiny': None, '14B': QWEN3_14B}.get(shape, shape))

def mixed(reads, low, high):
    "Embeddings, head, first and last block and every down projection and value in `high`, everything else in `low`"
    def wide(u): return u.block in (None, 0, reads.layers-1) or u.kind in ('down_proj', 'v_proj')
    return make_plan(reads, {u.path: high if wide(u) else low for u in reads.units}, f'mixed {low.bits},{high.bits}')

def every_other(reads, low, high):
    "Blocks in turn"
    formats = {u.path: high if (u.block or 0) % 2 else low for u in reads.units}
    return make_plan(reads, formats, f'alternating {low.bits},{high.bits}')

def at_random(reads, fmts, k):
    "A format for each unit, drawn with shares that are drawn themselves"
    rng = np.random.default_rng(k)
    shares = rng.dirichlet(np.ones(len(fmts)))
    return make_plan(reads, {u.path: fmts[rng.choice(len(fmts), p=shares)] for u in reads.units}, f'drawn {k}')

def plans_of(reads, bits, drawn=0):
    "The uniform plans, two mixed ones, and some that are drawn at random"
    fmts = [Format(b, 64) for b in bits]
    made = [uniform(reads, f) for f in fmts]+[mixed(reads, Format(4, 64), fmts[-1]), every_other(reads, fmts[0], fmts[-2])]
    return {p.name: p for p in made+[at_random(reads, fmts, k) for k in range(1, drawn+1)]}

def decode_speeds(models, context, tokens, rounds, seconds):
    "name ▸ Speed, one run of each model per round, in an order that turns; fewer rounds if time is up, but five at least"
    warmup, runs, names, start = 8, {n: [] for n in models}, list(models), time.time()
    for m in models.values(): _decode_once(m, context, 8, warmup)
    gc.collect()
    gc.disable() # a collection in the middle of a run would be charged to one plan
    try:
        for r in range(rounds):
            if r >= 5 and time.time()-start > seconds: break
            for n in names[r % len(names):]+names[:r % len(names)]: runs[n].append(_decode_once(models[n], context, tokens, warmup))
    finally: gc.enable()
    return {n: Speed(np.array(r), context+warmup+tokens/2) for n, r in runs.items()}

def block_times(model, first, runs):
    "Device seconds of one block at its real width, from models cut to two depths"
    blocks, ids, found = model.model.layers, mx.zeros((1, 1), mx.int32), []
    for depth in (2, 5):
        def forward(n):
            x, cache = ids, make_prompt_cache(model)
            for _ in range(n): x = mx.argmax(model(x, cache=cache)[:, -1:], -1)
            return x
        model.model.layers = blocks[:depth]
        try: found.append(_per_step(forward, 1, 2, first, 3*runs))
        finally: model.model.layers = blocks
    return dict(seconds=(found[1]['seconds']-found[0]['seconds'])/3, raw=found)

def after(model, context):
    "A chain of tokens that are read after so many others; each chain begins where the first one did"
    cache, ids = make_prompt_cache(model), mx.zeros((1, 1), mx.int32)
    for k in range(0, context, 512): mx.eval(model(mx.full((1, min(512, context-k)), 7, mx.int32), cache=cache)[:, -1:])
    def chain(n):
        for c in cache: c.trim(c.offset-context)
        x = ids+0 # which waits for what keeps the device busy, so that even no token does
        for _ in range(n): x = mx.argmax(model(x, cache=cache)[:, -1:], -1)
        return x
    return chain

def tokens_alone(models, context, bandwidth, runs):
    """Device seconds of one token of each model: it is sent off while the device is busy with something else for longer than that takes,
    so nothing waits for the host; the time of the other thing alone, just before, is taken off. All models in turn, run by run"""
    first = _keep_busy(bandwidth, 40) if _on_gpu() else None
    chains, found = {n: after(m, context) for n, m in models.items()}, {}
    for k in range(3*runs):
        for n, chain in chains.items():
            d = _per_step(chain, 0, 1, first, 1)
            for few, more in zip(found.setdefault(n, dict(few=0, many=1, raw=[[], []]))['raw'], d['raw']): few.extend(more)
    for n, d in found.items():
        late = np.mean([sent > short for (_, short), (sent, _) in zip(*d['raw'])])
        if first and late: print(f'{n}: in {late:.0%} of the runs the device was idle before all was sent off', flush=True)
        d |= dict(seconds=float(np.median([long-short for (_, short), (_, long) in zip(*d['raw'])])), context=context)
    return found

class Results(dict):
    "What was found so far, in a file that is written after each part"
    def __init__(self, path): self.path, self.start = Path(path), time.time()

    def keep(self, **parts):
        self.update(parts)
        part = self.path.with_name(self.path.name+'.part')
        part.write_text(json.dumps(self, indent=1, default=lambda x: x.tolist() if hasattr(x, 'tolist') else str(x))+'\n')
        part.replace(self.path)
        print(f'[{time.time()-self.start:5.0f} s]', ', '.join(parts), flush=True)

def measure_machine(args, out, reads, formats):
    "The chip: measured, or from the file of an earlier run; what that lacks is measured"
    raw = {}
    matrices, beside = (sorted({m for r in reads.values() for m in r.shapes(side)}, key=np.prod) for side in (False, True))
    if args.chip:
        before = json.loads(Path(args.chip).read_text())
        chip, raw = Chip(**before['chip']), before['raw']
    else: chip = _measure_chip(args.runs, raw)
    out.keep(chip=asdict(chip), raw=raw)
    for f in formats:
        chip = _extend(_extend(chip, matrices, [f], args.runs, raw), beside, [f], args.runs, raw, True)
        out.keep(chip=asdict(chip), raw=raw)
    print(chip)
    first = _keep_busy(chip.bandwidth) if _on_gpu() else None
    return first

def measure(args):
    "Everything that needs the machine"
    shapes, bits, out = args.shapes.split(','), sorted(map(int, args.bits.split(','))), Results(args.o)
    formats = [Format(b, 64) for b in bits]
    reads = {s: reads_of(skeleton(c := config_of(s)), c) for s in shapes}
    out.keep(about=dict(machine(), device=str(mx.device_info()), command=shlex.join(['python', *sys.argv])), shapes=shapes, bits=bits, drawn=args.drawn)
    first = measure_machine(args, out, reads, formats)
    decode, blocks, alone, contexts = {}, {}, {}, [int(c) for c in args.contexts.split(',') if c]
    for s in shapes:
        models = {n: _stand_in(skeleton(config_of(s)), p) for n, p in plans_of(reads[s], bits, args.drawn).items()}
        speeds = decode_speeds(models, args.context, args.tokens, args.rounds, args.seconds) if args.rounds else {}
        decode[s] = {n: dict(runs=v.runs.tolist(), context=v.context) for n, v in speeds.items()}
        out.keep(decode=decode)
        for n, v in speeds.items(): print(f'{s} {n}: {v}', flush=True)
        if args.chip is None: blocks[s] = {f'uniform {f}': block_times(models[f'uniform {f}'], first, args.runs) for f in formats}
        out.keep(blocks=blocks)
        if args.drawn: alone[s] = tokens_alone(models, args.context, out['chip']['bandwidth'], args.runs)
        out.keep(alone=alone)
        if args.drawn and args.empty: out.keep(empty=out.get('empty', {}) | {s: tokens_alone(models, 1, out['chip']['bandwidth'], args.runs)})
        some = {n: m for n, m in models.items() if n in (CALIBRATION, f'uniform {formats[-1]}')}
        for context in contexts:
            long = decode_speeds(some, context, args.tokens, args.rounds//4, args.seconds/6)
            decode[s] |= {f'{n}, context {context}': dict(runs=v.runs.tolist(), context=v.context) for n, v in long.items()}
            out.keep(decode=decode)
        del models, some
        mx.clear_cache()
    return out

def block_error(d, draws=1000):
    "Standard error of a block's microseconds, by bootstrap of the medians it is the difference of"
    rng, medians = np.random.default_rng(0), []
    for raw in (np.array(r)[:, 1] for depth in d['raw'] for r in depth['raw']):
        medians.append(np.median(rng.choice(raw, (draws, len(raw))), 1))
    few, many, deep_few, deep_many = medians
    return 1e6*float(np.std((deep_many-deep_few)-(many-few))/3)

def on_device(found, chip, s):
    "Microseconds of one block on the device alone: measured, and predicted with overheads learned at the calibration format"
    reads = reads_of(skeleton(c := config_of(s)), c)
    plans, blocks = plans_of(reads, found['bits'], found.get('drawn', 0)), found['blocks'].get(s, {})
    if CALIBRATION not in blocks: return []
    lat, inner, rows = Latency(chip, reads), [u for u in reads.units if u.block is not None], []
    read = {n: 1e3*sum(lat(u, plans[n][u.path]) for u in inner)/reads.layers for n in blocks}
    rest = 1e6*blocks[CALIBRATION]['seconds']-read[CALIBRATION]
    for n, d in blocks.items():
        measured = 1e6*d['seconds']
        rows.append(dict(name=n, measured=measured, measured_se=block_error(d), predicted=read[n]+rest, error=(read[n]+rest)/measured-1,
                         calibration=n == CALIBRATION, as_measured_on_the_chip=read[n]+chip.dispatch))
    return rows

def alone(found, chip, s):
    "Milliseconds of a token on the device alone: measured, and predicted with one calibration point"
    reads, times = reads_of(skeleton(c := config_of(s)), c), found.get('alone', {}).get(s, {})
    if not times: return []
    plans, ms = plans_of(reads, found['bits'], found.get('drawn', 0)), {n: 1e3*d['seconds'] for n, d in times.items()}
    lat = Latency(replace(chip, host=0., host_constant=0.), reads, times[CALIBRATION]['context']) # nothing waits for the host
    lat = lat.learn(plans[CALIBRATION], ms[CALIBRATION], name=CALIBRATION)
    return [dict(name=n, measured=t, spread=500/times[n]['many']*float(np.subtract(*np.percentile([done for _, done in times[n]['raw'][1]], [75, 25]))), predicted=lat.ms(plans[n]),
                 error=lat.ms(plans[n])/t-1, calibration=n == CALIBRATION) for n, t in ms.items()]

def against(chip, reads, plans, speeds):
    "Prediction with one calibration point, and its table"
    lat = Latency(chip, reads, round(speeds[CALIBRATION].context))
    lat = lat.learn(plans[CALIBRATION], speeds[CALIBRATION].ms, name=CALIBRATION)
    return lat, compare_speeds(lat, plans, {n: v for n, v in speeds.items() if n in plans})

ESTIMATES = dict(median=lambda ms: 1/np.median(1/ms), fastest=np.min, mean=np.mean) # of milliseconds per token; the median is that of speeds

def variants(found, chip):
    """Other models of time and other estimates of speed, each calibrated with one plan per shape: model ▸ estimate ▸ errors of all other plans.
    `in pairs` calibrates each round with the calibration plan's run of that round, and takes the median of what the prediction is off."""
    out = {}
    for s, decode in found['decode'].items():
        if not decode: continue # tokens on the device alone
        reads, c = reads_of(skeleton(c := config_of(s)), c), CALIBRATION
        plans = plans_of(reads, found['bits'], found.get('drawn', 0))
        ms, lat = {n: 1e3/np.array(decode[n]['runs']) for n in plans}, Latency(chip, reads, round(decode[c]['context']))
        device = {n: lat.device(p) for n, p in plans.items()}
        models = {'max(device, host)': lambda n, t: lat.learn(plans[c], t).ms(plans[n]), # as the package has it
                  'max(device, host), the rest is the host': lambda n, t: max(device[n], t),
                  'device + rest': lambda n, t: device[n]+t-device[c],
                  'one speed for all': lambda n, t: t}
        for name, model in models.items():
            for n in [n for n in plans if n != c]:
                for kind, of in ESTIMATES.items():
                    out.setdefault(name, {}).setdefault(kind, {})[f'{s} {n}'] = float(of(ms[n])/model(n, float(of(ms[c])))-1)
                off = [t/model(n, float(at))-1 for t, at in zip(ms[n], ms[c])]
                out[name].setdefault('in pairs', {})[f'{s} {n}'] = float(np.median(off))
    for name, kinds in out.items():
        print(name, {k: f'{np.mean(np.abs(list(e.values()))):.1%}' for k, e in kinds.items()})
    return out

def of_loop(found, chip, s, shorts):
    "Tables of mlx-lm's own loop, median and fastest round; `shorts` gets the errors of both"
    reads = reads_of(skeleton(c := config_of(s)), c)
    plans = plans_of(reads, found['bits'], found.get('drawn', 0))
    speeds = {n: Speed(np.array(d['runs']), d['context']) for n, d in found['decode'][s].items()}
    best = {n: Speed(v.runs.max(keepdims=True), v.context) for n, v in speeds.items()}
    (lat, table), (_, fastest) = (against(chip, reads, plans, v) for v in (speeds, best))
    for kind, t in dict(median=table, fastest=fastest).items():
        shorts[kind] += [abs(e) for n, e in t.errors().items() if n != CALIBRATION]
    print(f'\nQwen3-{s} on {chip.name}, context {lat.context}, median of {len(speeds[CALIBRATION].runs)} rounds\n{table}')
    print('fastest round:', ', '.join(f'{r["name"]} {r["measured"]:.1f} ({fastest.errors()[r["name"]]:+.1%})' for r in fastest.rows),
          f'mean absolute error {fastest.mean_error:.1%}')
    far = {n: replace(lat, context=round(v.context)).tps(plans[n.split(', context')[0]]) for n, v in speeds.items() if n not in plans}
    for n, p in far.items(): print(f'{n}: predicted {p:.1f}, measured {speeds[n]}, {p/speeds[n].tps-1:+.1%}')
    plain = Latency(chip, reads, lat.context)
    print('terms of the calibration point in ms, as measured on the chip:', {k: round(v, 3) for k, v in plain.terms(plans[CALIBRATION]).items()})
    return dict(rows=table.rows, fastest=fastest.rows, mean_error=table.mean_error, long_context=far, fastest_mean_error=fastest.mean_error,
                terms={n: plain.terms(p) for n, p in plans.items()}, learned={k: getattr(lat.chip, k) for k in _LEARNED})

def mean_and_worst(rows):
    off = [abs(r['error']) for r in rows if not r['calibration']]
    return dict(plans=len(off), mean_error=float(np.mean(off)), worst=float(max(off))) if off else {}

def predict(found):
    "Tables of predicted and measured speed, one calibration point per shape"
    chip, tables, shorts = Chip(**found['chip']), {}, dict(median=[], fastest=[])
    for s, decode in found['decode'].items():
        tables[s] = of_loop(found, chip, s, shorts) if decode else {}
        blocks, tokens, lone = on_device(found, chip, s), alone(found, chip, s), alone(found, replace(chip, beside={}), s)
        for r in blocks: print(f'one block on the device, {r["name"]}: predicted {r["predicted"]:.1f} µs, measured {r["measured"]:.1f} '
                               f'± {r["measured_se"]:.1f} µs, {r["error"]:+.1%}'+' *'*r['calibration'])
        for r in tokens: print(f'a token on the device, {r["name"]}: predicted {r["predicted"]:.2f} ms, measured {r["measured"]:.2f} ± {r["spread"]:.2f}, {r["error"]:+.1%}'
                               +' *'*r['calibration'])
        for what, rows in dict(alone=tokens, each_by_itself=lone).items():
            if rows: print(f'a token on the device, {what}: {mean_and_worst(rows)}')
        tables[s] |= dict(alone=tokens, each_by_itself=lone, blocks=blocks)
    for kind, e in shorts.items():
        if e: print(f'{kind}: mean absolute error of {len(e)} plans: {np.mean(e):.2%}, worst {max(e):.2%}')
    short = {k: dict(mean_error=float(np.mean(e)), worst=float(max(e))) for k, e in shorts.items() if e}
    return dict(tables=tables, variants=variants(found, chip), **short)

def joined(files):
    "Runs on one chip as one, with what each of them measured"
    parts = [json.loads(Path(f).read_text()) for f in files]
    first = parts[0]
    if any(p['chip'] != first['chip'] for p in parts): raise SystemExit('the files are of different chips: predict from each by itself')
    decode, blocks, alone = ({s: v for p in parts for s, v in p.get(k, {}).items()} for k in ('decode', 'blocks', 'alone'))
    further = first.get('further', {}) | {', '.join(p['decode']): dict(about=p['about']) for p in parts[1:]}
    return dict(about=first['about'], further=further, bits=first['bits'], drawn=first.get('drawn', 0), chip=first['chip'], raw=first['raw'], decode=decode, blocks=blocks, alone=alone)

def add_alone(args):
    "Time tokens on the device alone for the plans of an earlier file"
    found, out = json.loads(Path(args.alone).read_text()), Results(args.o or args.alone)
    for s in args.shapes.split(','):
        reads = reads_of(skeleton(c := config_of(s)), c)
        models = {n: _stand_in(skeleton(config_of(s)), p) for n, p in plans_of(reads, found['bits'], found.get('drawn', 0)).items()}
        found.setdefault('alone', {})[s] = tokens_alone(models, args.context, found['chip']['bandwidth'], args.runs)
        found['alone_about'] = dict(machine(), command=shlex.join(['python', *sys.argv]))
        out.keep(**found)
    out.keep(**predict(found))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('-o', help='latency.json by default')
    p.add_argument('--from', dest='source', nargs='+', help='predict from these files, measure nothing')
    p.add_argument('--alone', help='add tokens on the device alone to this file of an earlier run')
    p.add_argument('--chip', help='take the chip from the file of an earlier run, and measure decoding only')
    p.add_argument('--shapes', default='0.6B,1.7B,8B')
    p.add_argument('--bits', default='3,4,6,8')
    p.add_argument('--drawn', type=int, default=0, help='plans with a format drawn for each unit')
    p.add_argument('--runs', type=int, default=7, help='of each measurement of the chip')
    p.add_argument('--rounds', type=int, default=40, help='of decoding')
    p.add_argument('--seconds', type=float, default=55, help='for decoding, per shape')
    p.add_argument('--context', type=int, default=32)
    p.add_argument('--contexts', default='2048', help='further ones, for two plans of each shape')
    p.add_argument('--tokens', type=int, default=24, help='per round')
    p.add_argument('--empty', action='store_true', help='tokens on the device alone also with an empty cache')
    args = p.parse_args()
    if args.alone: return add_alone(args)
    if args.source:
        found = joined(args.source)
        found |= predict(found)
        if args.o: Results(args.o).keep(**found)
        return
    args.o = args.o or 'latency.json'
    out = measure(args)
    out.keep(**predict(json.loads(Path(args.o).read_text())))

if __name__ == '__main__': main()
