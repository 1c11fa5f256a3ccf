"""Which text should a model be calibrated on? Calibrated on one kind of text, scored on every other.

    python bench/texts.py --model MODEL [--format 4g64] [--n 8] [--learn 4] -o texts.json

All texts are on a Python install or made here, the same ones each time:

`prose`     docstrings of the standard library, without examples
`code`      its source without docstrings and comments
`dialogue`  generated conversations, in the model's chat template if it has one
`numbers`   generated sums, tables and dates

Calibration and test text come from different modules, or from different seeds. Every tensor has the same format, rounded by `search` on
1,024 tokens of the calibration text: what differs is the text alone. `bundled`, the default calibration text, stands beside them,
`minmax`, which asks no text, below, and `mixed`, a quarter of each of the four.
"""
import argparse
import ast
import json
import random
import sys
import sysconfig
import time
import zlib
from pathlib import Path

import numpy as np

def modules(side: str): # 'train' or 'test' ▸ (source, syntax tree) of modules
    "The standard library, every other module for each side"
    for f in sorted(Path(sysconfig.get_paths()['stdlib']).glob('*.py')):
        if (zlib.crc32(f.name.encode()) % 2 == 0) == (side == 'train'):
            source = f.read_text(encoding='utf-8')
            yield source, ast.parse(source)

def documented(tree): return [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]

def prose(side, tokenizer):
    texts = [d for _, tree in modules(side) for n in documented(tree) if (d := ast.get_docstring(n))]
    return [t for t in texts if len(t) > 300 and '>>>' not in t]

def code(side, tokenizer):
    def bare(tree):
        for n in documented(tree):
            if ast.get_docstring(n) is not None: n.body = n.body[1:] or [ast.Pass()]
        return ast.unparse(tree) # comments are gone as well
    return [bare(tree) for _, tree in modules(side)]

NAMES = 'Ada Ben Carla Dev Emil Fatima Greta Hugo Ines Jonas Kira Leon'.split()
PLACES = 'the harbour,the library,the old mill,the night market,the botanical garden,the small cinema,the station,the lake'.split(',')
THINGS = 'a red umbrella,two tickets,the blue notebook,a box of tea,my camera,the spare key,a map of the town,fresh bread'.split(',')
ASKED = ['Could you tell me how to get to {place}?', 'Do you remember where {name} left {thing}?', 'What should I bring when we meet at {place}?',
         'I am not sure whether {name} is coming. What do you think?', 'Why was {place} closed yesterday?', 'Can you help me to write a short note to {name}?']
ANSWERED = ['Sure. Take the second street on the left and walk until you see {place}; it takes about ten minutes.',
            'I think {name} put {thing} on the shelf near the door, but you had better ask again.', 'Bring {thing}, and something warm. It gets cold near {place} in the evening.',
            '{name} said that it depends on the weather. If it rains, we can still meet at {place}.',
            'Because of the repairs. It should be open again on Monday, and then {name} will show us around.',
            'Of course: "Dear {name}, thank you for {thing}. I hope to see you soon at {place}."']

def dialogue(side, tokenizer):
    r = random.Random(f'dialogue {side}')
    def said(lines): return r.choice(lines).format(name=r.choice(NAMES), place=r.choice(PLACES), thing=r.choice(THINGS))
    def talk():
        turns = [dict(role=role, content=said(lines)) for _ in range(r.randint(2, 5)) for role, lines in (('user', ASKED), ('assistant', ANSWERED))]
        if getattr(tokenizer, 'chat_template', None): return tokenizer.apply_chat_template(turns, tokenize=False)
        return '\n'.join(f'{t["role"]}: {t["content"]}' for t in turns)
    return [talk() for _ in range(400)]

def numbers(side, tokenizer):
    r = random.Random(f'numbers {side}')
    def line():
        a, b, c = r.randint(10, 9999), r.randint(10, 999), r.randint(2, 99)
        return r.choice([f'{a} + {b} = {a+b}', f'{b} * {c} = {b*c}', f'{a} - {b} = {a-b}', f'{a},{b},{c},{a/c:.2f}', f'{1900+c}-{1+a%12:02}-{1+b%28:02} {a%24:02}:{b%60:02}',
                         f'({a} + {b}) * {c} = {(a+b)*c}', f'{c}% of {a} is {a*c/100:.2f}'])
    return ['\n'.join(line() for _ in range(40)) for _ in range(200)]

TEXTS = dict(prose=prose, code=code, dialogue=dialogue, numbers=numbers)

def main(): # the texts alone need none of these
    from optiq.backends.torch import TorchBackend
    from optiq.calibration import fingerprint, passages, token_batch
    from optiq.evals.perplexity import evaluate, overrides_of
    from optiq.models import Checkpoint
    from optiq.plan import uniform
    from optiq.report import machine
    from optiq.rounding import as_overrides, round_model

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', required=True)
    p.add_argument('--format', default='4g64')
    p.add_argument('--learn', type=int, default=4, help='calibration sequences of 256 tokens')
    p.add_argument('--n', type=int, default=8, help='test sequences of 256 tokens, of each text')
    p.add_argument('--note', default='', help='kept with the results')
    p.add_argument('-o', '--output', default='texts.json')
    args, start = p.parse_args(), time.time()
    c = Checkpoint(args.model)
    b, t, plan = TorchBackend(c), c.tokenizer, uniform(c, args.format)
    def batch(texts, n): return token_batch([x[k:k+800] for x in texts for k in range(0, len(x), 800)], t, n, 256, 42) # pieces of many
    learned = {k: batch(f('train', t), args.learn) for k, f in TEXTS.items()} | dict(bundled=batch(passages('bundled'), args.learn))
    learned['mixed'] = np.concatenate([learned[k][:max(1, args.learn//4)] for k in TEXTS])
    scored = {k: batch(f('test', t), args.n) for k, f in TEXTS.items()}
    variants = {k: as_overrides(dict(round_model(b, ids, plan, 'search'))) for k, ids in learned.items()} | dict(minmax=overrides_of(plan))
    print(f'rounded in {time.time()-start:.0f} s', flush=True)
    about = dict(model=Path(args.model).name, format=args.format, true_bpw=plan.true_bpw, rounding=f'search, {args.learn} × 256 tokens',
                 scored=f'{args.n} × 256 tokens of each text', tokens={k: fingerprint(v) for k, v in {**scored, **{f'{k} learned': v for k, v in learned.items()}}.items()},
                 command=' '.join(sys.argv), note=args.note, **machine())
    rows = []
    for text, tokens in scored.items():
        found = evaluate(b, tokens, variants)
        for k in variants:
            s = found[k]
            rows.append(dict(calibration=k, text=text, kl=float(s.kl.mean()), kl_se=float(s.kl.std(ddof=1)/len(s.kl)**.5), kl_p99=s.kl_p99,
                             perplexity=s.perplexity, reference_perplexity=found['reference'].perplexity, kl_each=[float(f'{v:.6g}') for v in s.kl]))
            print(f'{k:10} {text:10} KL {s.kl.mean():.4f} ± {rows[-1]["kl_se"]:.4f}', flush=True)
        Path(args.output).write_text(json.dumps(dict(about=about | dict(seconds=round(time.time()-start)), rows=rows), indent=1)+'\n')

if __name__ == '__main__': main()
