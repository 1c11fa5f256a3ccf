"""A second witness: a Llama of 33 million parameters, trained here, on which tools can be compared as they are on SmolLM2.

    python bench/witness.py texts OUT [--tokens 40]     # text, tokenizer, tokens; all cores
    python bench/witness.py train OUT [--steps 3000]    # on one GPU: OUT/model is a Hugging Face checkpoint, that of the lowest held-out loss

Heads of 64, two of keys and values for eight of queries, a head of its own (not tied), and widths that K-quants' blocks of 256 divide.
Nothing is planted. The text is what stands on the machine: docstrings and sources of the installed Python and its packages, generated
conversations, numbers and word problems. One file in twenty is held out; half of what these hold becomes `valid.jsonl` (to calibrate
on), half `test.jsonl` (to score on).
"""
import argparse
import ast
import json
import random
import sys
import sysconfig
import time
import zlib
from multiprocessing import Pool
from pathlib import Path

import numpy as np

VOCAB = 8192
SHAPE = dict(vocab_size=VOCAB, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2,
             head_dim=64, tie_word_embeddings=False, max_position_embeddings=512, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=0, pad_token_id=0)
SHARES = dict(docstrings=.6, code=.25, made=.15) # of the characters
LETTERS = 3.3 # characters a token, about

def held_out(name): return zlib.crc32(name.encode()) % 20 == 0

def sources(): # files, in an order that is drawn once
    "Python files of the standard library and the packages"
    found = {f.resolve() for k in ('stdlib', 'purelib') for f in Path(sysconfig.get_paths()[k]).rglob('*.py') if 2000 < f.stat().st_size < 200_000}
    return sorted(found, key=lambda f: zlib.crc32(f.name.encode()+f.parent.name.encode()))

def texts_of(f): # file ▸ docstrings, source
    "What a file gives; nothing if it cannot be parsed"
    try: tree = ast.parse(source := f.read_text(encoding='utf-8'))
    except (SyntaxError, ValueError): return [], ''
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    return [d for n in found if len(d := ast.get_docstring(n) or '') > 200], source[:8000]

def python_texts(room: int): # characters ▸ (kind, file, text)
    "Docstrings, and sources as they are"
    left, files = {k: room*SHARES[k] for k in ('docstrings', 'code')}, sources()
    with Pool() as pool:
        for f, (docs, source) in zip(files, pool.imap(texts_of, files, 32)):
            for kind, some in (('docstrings', docs), ('code', [source] if source else [])):
                if left[kind] > 0:
                    left[kind] -= sum(map(len, some))
                    yield from ((kind, f.name, t) for t in some)
            if max(left.values()) < 0: return

def made_texts(room: int): # characters ▸ (kind, name, text)
    "Word problems, conversations and numbers"
    from optiq.material.mixture import mixture
    from texts import dialogue, numbers # beside this file
    for k, side in enumerate(('train', 'test')): # a file name that `held_out` puts on that side
        name = next(f'made {i}' for i in range(1000) if held_out(f'made {i}') == (side == 'test'))
        all_of = [*dialogue(side, None), *numbers(side, None)]
        random.Random(k).shuffle(all_of)
        for text in all_of: yield 'made', name, text
        rest = room-sum(map(len, all_of)) if side == 'train' else room//20
        for o in mixture(seed=k) if side == 'train' else []:
            if rest < 0: break
            text = f'{o["prompt"]} {o["answer"]}'.strip()
            rest -= len(text)
            yield 'made', name, text

def texts(args):
    "Write tokenizer, tokens.npy, held.npy, valid.jsonl and test.jsonl"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    start, out, room = time.time(), args.out, args.tokens*1e6*LETTERS
    out.mkdir(parents=True, exist_ok=True)
    found, seen, sizes = dict(train=[], held=[]), set(), {}
    for kind, name, text in (*python_texts(room), *made_texts(int(room*SHARES['made']))):
        key = zlib.crc32(text[:200].encode('utf-8', 'replace')) # the same page in two books, the same docstring in two classes
        if key in seen: continue
        seen.add(key)
        sizes[kind] = sizes.get(kind, 0)+len(text)
        found['held' if held_out(name) else 'train'].append(text)
    for side in found.values(): random.Random(0).shuffle(side)
    print({k: f'{n/1e6:.1f} M characters' for k, n in sizes.items()}, {k: len(v) for k, v in found.items()}, f'{time.time()-start:.0f} s', flush=True)
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(found['train'][::4], trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=['<|endoftext|>'], show_progress=False,
                                                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    PreTrainedTokenizerFast(tokenizer_object=tok, eos_token='<|endoftext|>', pad_token='<|endoftext|>').save_pretrained(out/'model')
    print(f'tokenizer {time.time()-start:.0f} s', flush=True)
    ids = {k: np.concatenate([np.array(e.ids+[0], np.uint16) for p in range(0, len(v), 2000) for e in tok.encode_batch_fast(v[p:p+2000])])
           for k, v in found.items()}
    train = ids['train'][:int(args.tokens*1e6)]
    np.save(out/'tokens.npy', train)
    np.save(out/'held.npy', ids['held'][:200_000])
    half = len(found['held'])//2
    for name, part in (('valid', found['held'][:half]), ('test', found['held'][half:])):
        (out/f'{name}.jsonl').write_text(''.join(json.dumps(dict(text=t), ensure_ascii=False)+'\n' for t in part))
    (out/'texts.json').write_text(json.dumps(dict(characters=sizes, documents={k: len(v) for k, v in found.items()}, tokens=len(train),
        held_tokens=len(ids['held']), seconds=round(time.time()-start), command=' '.join(sys.argv)), indent=1)+'\n')
    print(f'{len(train)/1e6:.2f} M tokens, {len(ids["held"])/1e6:.2f} M held out, {time.time()-start:.0f} s')

def train(args):
    "Train for so many steps, with a learning rate that falls to nothing, and keep the weights of the lowest held-out loss"
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    start, device = time.time(), 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.manual_seed(0)
    torch.set_float32_matmul_precision('high')
    tokens = torch.from_numpy(np.load(args.out/'tokens.npy').astype(np.int64)).to(device)
    held = torch.from_numpy(np.load(args.out/'held.npy').astype(np.int64)).to(device)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=dict(rope_type='default', rope_theta=10000.))).to(device)
    size, length = sum(p.numel() for p in model.parameters()), args.length
    decayed = [p for p in model.parameters() if p.ndim == 2]
    optimizer = torch.optim.AdamW([dict(params=decayed, weight_decay=.1), dict(params=[p for p in model.parameters() if p.ndim < 2], weight_decay=0)],
                                  lr=args.rate, betas=(.9, .95), fused=device == 'cuda')
    def loss_of(ids):
        with torch.autocast(device, torch.bfloat16): logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
    step_loss = torch.compile(loss_of) if device == 'cuda' and not args.eager else loss_of
    offsets = torch.arange(length+1, device=device)
    def batch(): return tokens[torch.randint(len(tokens)-length, (args.batch, 1), device=device)+offsets]
    def held_loss():
        rows = held[:len(held)//(length+1)*(length+1)].view(-1, length+1)
        with torch.no_grad(): return float(sum(loss_of(r)*len(r) for r in rows.split(32))/len(rows))
    step_loss(batch()).backward() # compiles
    optimizer.zero_grad(set_to_none=True)
    print(f'{size/1e6:.1f} M parameters, {len(tokens)/1e6:.2f} M tokens, {device}, compiled after {time.time()-start:.0f} s', flush=True)
    begun, log, best = time.time(), [], (float('inf'), 0, {})
    for step in range(1, args.steps+1):
        for g in optimizer.param_groups: g['lr'] = args.rate*min(1, step/200, 1.02-step/args.steps)
        loss = step_loss(batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % args.every == 0 or step == args.steps:
            log.append((step, round(float(loss), 4), round(held_loss(), 4)))
            if log[-1][2] < best[0]: best = log[-1][2], step, {k: v.clone() for k, v in model.state_dict().items()}
            print(f'{step} steps, {time.time()-begun:.0f} s, loss {log[-1][1]}, held out {log[-1][2]}', flush=True)
    held_best, step, weights = best
    model.load_state_dict(weights)
    found = dict(parameters=size, steps=step, of_steps=args.steps, tokens_seen=step*args.batch*length, passes=round(step*args.batch*length/len(tokens), 1),
                 batch=args.batch, length=length, rate=args.rate, held_loss=held_best, curve=log, torch=torch.__version__,
                 device=torch.cuda.get_device_name() if device == 'cuda' else 'cpu', command=' '.join(sys.argv), seconds=round(time.time()-start))
    model.to(torch.bfloat16).save_pretrained(args.out/'model')
    config = args.out/'model/config.json'
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(rope_theta=10000., torch_dtype='bfloat16'), indent=1)+'\n') # mlx-lm asks for it
    (args.out/'model/training.json').write_text(json.dumps(found, indent=1)+'\n')
    print({k: v for k, v in found.items() if k != 'curve'})

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('step', choices=['texts', 'train'])
    p.add_argument('out', type=Path)
    p.add_argument('--tokens', type=float, default=40, help='millions to train on, if there is so much text')
    p.add_argument('--steps', type=int, default=3000)
    p.add_argument('--every', type=int, default=250, help='steps from one look at the held-out text to the next')
    p.add_argument('--batch', type=int, default=128)
    p.add_argument('--length', type=int, default=256)
    p.add_argument('--rate', type=float, default=1.5e-3)
    p.add_argument('--eager', action='store_true', help='without torch.compile')
    args = p.parse_args()
    dict(texts=texts, train=train)[args.step](args)

if __name__ == '__main__': main()
