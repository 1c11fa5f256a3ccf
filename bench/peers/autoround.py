"""AutoRound's MLX export of a model, tuned on given tokens; it needs neither OptiQ nor MLX. `kquants.py --rounded` scores what it writes.

    python3 -m pip install auto-round==0.16.1
    python3 bench/peers/autoround.py MODEL TOKENS.json OUT [--seq-len 2048] [--iters 200] W4 3.5:W2-W3-W4-W8 …

TOKENS.json is a list of sequences of --seq-len tokens, such as `token_batch(passages('valid.txt', 'all'), tokenizer, 128, 2048).tolist()`
of optiq.calibration. W4 is one width for all matrices of the blocks, W4-asym the same with a zero point,
and 3.5:W2-W3-W4-W8 an AutoScheme of so many true bits from these widths, all in groups of 64. AutoRound counts a scale of 16 bits and a zero
point of the width for each group where MLX stores two numbers of 16, so we ask it for the same model in its own bits. Everything else that
is not said here is AutoRound's default: 128 sequences, 8 at once, 200 steps, their rate. OUT/SPEC is an MLX checkpoint whose embedding is left
as it is, and OUT/SPEC/peer.json says what made it.
"""
import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from auto_round import AutoRound, AutoScheme
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('model')
    p.add_argument('tokens', type=Path)
    p.add_argument('out', type=Path)
    p.add_argument('specs', nargs='+')
    p.add_argument('--seq-len', type=int, default=2048)
    p.add_argument('--iters', type=int, default=200)
    p.add_argument('--rate', type=float, help="AutoRound's own is 1 / iters")
    args = p.parse_args()
    sequences, tokenizer = json.loads(args.tokens.read_text()), AutoTokenizer.from_pretrained(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [dict(input_ids=torch.tensor(ids), attention_mask=torch.ones(len(ids), dtype=torch.long)) for ids in sequences]
    texts = args.out/'texts.json' # AutoScheme takes no tokens. It drops a text with fewer than it asks for, so each has some of the next as well
    texts.write_text(json.dumps([tokenizer.decode(a+b[:len(b)//4]) for a, b in zip(sequences, sequences[1:]+sequences[:1])]))
    for spec in args.specs:
        bits, _, how = spec.partition('-' if spec[0] == 'W' else ':')
        if how == 'asym': scheme = dict(bits=int(bits[1:]), group_size=64, sym=False, data_type='int')
        elif bits[0] == 'W': scheme = f'{bits}A16G64'
        else: scheme = AutoScheme((float(bits)-.5)*(1+1/64)+.25, [f'{w}A16G64' for w in how.split('-')], dataset=str(texts))
        folder, start = args.out/spec.replace(':', '-'), time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
        AutoRound(model, tokenizer, scheme=scheme, dataset=DataLoader(rows, 8) if how in ('', 'asym') else str(texts), seqlen=args.seq_len, nsamples=len(rows), iters=args.iters,
                  **{} if args.rate is None else dict(lr=args.rate), device_map=0 if torch.cuda.is_available() else 'cpu',
                  **{} if torch.cuda.is_available() else dict(enable_torch_compile=False)).quantize_and_save(folder, format='mlx')
        (folder/'peer.json').write_text(json.dumps(dict(quantize_seconds=round(time.perf_counter()-start, 1), iters=args.iters, tuned_on=len(rows),
            seq_len=args.seq_len, versions={k: version(k) for k in ('auto-round', 'torch', 'transformers')}, command=' '.join(sys.argv),
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'))+'\n')
        print(spec, f'{time.perf_counter()-start:.0f} s', flush=True)

if __name__ == '__main__': main() # AutoScheme starts processes, which open this file again
