"""What people pick instead: llama.cpp's K-quants, AutoRound, oMLX's oQ. Same text, same scorer, true bytes, as in `ours.py`.

    python3 -m venv VENV; VENV/bin/pip install -e . gguf==0.19.0
    npm pack @node-llama-cpp/linux-x64@3.21.1; tar xzf node-llama-cpp-linux-x64-3.21.1.tgz  # llama.cpp, built: package/bins/linux-x64
    pip download --no-deps flyto-mlx==0.7.0; unzip flyto_mlx-*.whl omlx/oq.py              # oMLX's oq.py, in a package of others
    VENV/bin/python bench/peers/kquants.py --llama package/bins/linux-x64 --oq omlx/oq.py --model MODEL --calibration valid.txt \\
        --test test.txt [--only kquants,across,unsloth,autoround,oq] [--score-n 16] -o kquants.json

`kquants`    llama.cpp's own quantizer on a GGUF of the model, which chooses a type for each tensor; with and without importance matrix
`across`     its encoders, with the types that it chooses for a model whose width fits; see below
`unsloth`    what Unsloth publishes of its dynamic recipes, see `WIDER`: with llama.cpp's encoders, and on MLX as mlx-node carries it over
`autoround`  AutoRound's MLX export, as autoround.py wrote it with --rounded RECIPE=FOLDER; it leaves the embedding as it is, so that is
             rounded at several widths
`oq`         the plan of oMLX's `oq.py` from block errors on our calibration text, rounded by min-max (oQ) or by its importance search (oQe)

K-quants need rows of a multiple of 256 weights. SmolLM2-135M is 576 wide, so llama.cpp falls back to older types with blocks of 32: Q3_K to
Q4_0, Q4_K to Q5_0, Q5_K to Q5_1, Q6_K and the embedding to Q8_0. Only `down_proj`, 1,536 wide, becomes a K-quant. The rows `llama.cpp …` are
what a user of this model gets; of K-quants they say little. For the rows `across …` a block of 256 runs on into the next row: each tensor is
read as a quarter of the rows, four times as wide, and sub-blocks of 16 and 32 still lie within one row. Bytes are exact, quality is that of the
encoder, and llama.cpp opens no such file. Its importance matrix leaves out the embedding, and so do we, but for the rows that say `with head`:
there the tied embedding has a type of its own (llama-quantize's --token-embedding-type) and the importance of the head's inputs.

Bytes are those of everything that a file stores for its tensors, with norms in float32 as llama.cpp keeps them. `against_ours` is the difference
to OptiQ's rows (allocation and GPTQ) at the same bytes, sequence by sequence, with log KL interpolated over bits between two neighbouring rows;
above our largest row, to that one.
Rows are written one by one; a row that is there is measured again only if more sequences are asked for. `--only again` measures nothing:
it takes `against_ours` of every row from the rows that --ours holds today. `--only join` takes the rows of --joined, measured elsewhere; each says where.
"""
import argparse
import ctypes
import json
import os
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, dequantize, get_tensor_name_map, quantize
from transformers import AutoModelForCausalLM

from ours import Bench, evaluate, make_plan, our_rows, overrides_of, timed, together, uniform

KQUANTS = 'Q3_K_S,Q3_K_M,IQ4_XS,Q4_K_S,Q4_K_M,Q5_K_S,Q5_K_M,Q6_K'
LOW = 'Q2_K,IQ3_XXS' # below 4 bits, with an importance matrix only
EMBEDDINGS = 'Q3_K_S/Q4_K,Q3_K_M/Q4_K,Q4_K_S/Q4_K,Q4_K_S/Q5_K,Q4_K_M/Q5_K,Q5_K_S/Q5_K' # as llama-quantize's --token-embedding-type

# Bits above the base, from Unsloth's per-tensor study of 121 configurations (unsloth.ai, Qwen3.5 GGUF benchmarks) as mlx-node's `unsloth` recipe
# reads it; where head and embedding are one matrix it gets the head's. Seven bits become eight.
WIDER = dict(ffn_gate=0, ffn_up=0, ffn_down=1, attn_q=2, attn_k=2, attn_v=2, attn_output=2, token_embd=3, output=3)
KINDS = {2: 'Q2_K', 3: 'Q3_K', 4: 'Q4_K', 5: 'Q5_K', 6: 'Q6_K', 8: 'Q8_0'}

class Settings(ctypes.Structure):
    "llama_model_quantize_params of llama.h"
    _fields_ = [(n, ctypes.c_int) for n in ('nthread', 'ftype', 'output_tensor_type', 'token_embedding_type')]+[
        (n, ctypes.c_bool) for n in ('allow_requantize', 'quantize_output_tensor', 'only_copy', 'pure', 'keep_split', 'dry_run')]+[
        (n, ctypes.c_void_p) for n in ('imatrix', 'kv_overrides', 'tensor_types', 'prune_layers')]

class Importance(ctypes.Structure):
    "llama_model_imatrix_data of llama.h"
    _fields_ = [('name', ctypes.c_char_p), ('data', ctypes.POINTER(ctypes.c_float)), ('size', ctypes.c_size_t)]

floats = lambda a: a.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

class Llama:
    "llama.cpp's quantizer and encoders"
    def __init__(self, folder):
        find = lambda name: next(str(f) for f in sorted(Path(folder).iterdir()) if f.name.startswith(name) and '.so' in f.name)
        self.ggml, self.llama = (ctypes.CDLL(find(n), ctypes.RTLD_GLOBAL) for n in ('libggml-base', 'libllama.'))
        self.llama.llama_model_quantize_default_params.restype = Settings
        self.ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, _: level == 4 and print(text.decode(), end=''))
        self.llama.llama_log_set(self.log, None)
        build = Path(folder)/'_nlcBuildMetadata.json'
        self.version = json.loads(build.read_text())['buildOptions']['llamaCpp']['release'] if build.exists() else 'unknown'
        s = self.llama.llama_model_quantize_default_params()
        assert (s.ftype, s.quantize_output_tensor, s.pure, s.imatrix) == (LlamaFileType.MOSTLY_Q8_0, True, False, None), 'another llama.h'

    def quantize(self, source, out, ftype, imatrix=None):
        "Write a GGUF as llama-quantize does"
        s = self.llama.llama_model_quantize_default_params()
        s.nthread, s.ftype = os.cpu_count(), LlamaFileType[f'MOSTLY_{ftype}']
        if imatrix:
            rows = [Importance(k.encode(), floats(v), v.size) for k, v in imatrix.items()]+[Importance(None, None, 0)]
            kept = (Importance*len(rows))(*rows)
            s.imatrix = ctypes.cast(kept, ctypes.c_void_p)
        if self.llama.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(s)): raise ValueError(f'llama.cpp did not write {ftype}')
        return out

    def encode(self, w, kind, importance=None):
        "A matrix in a type of llama.cpp, as bytes"
        w, (n, k), kind = np.ascontiguousarray(w, np.float32), w.shape, GGMLQuantizationType[kind]
        block, size = GGML_QUANT_SIZES[kind]
        out = np.empty((n, k//block*size), np.uint8)
        if importance is not None: importance = floats(np.ascontiguousarray(importance, np.float32))
        got = self.ggml.ggml_quantize_chunk(int(kind), floats(w), out.ctypes.data_as(ctypes.c_void_p), *map(ctypes.c_int64, (0, n, k)), importance)
        if got != out.size: raise ValueError(f'{kind.name}: {got} bytes where {out.size} were expected')
        return out

class Source:
    "The model as llama.cpp has it: names, and rows of q and k in its order"
    def __init__(self, folder, work):
        self.folder, self.work = folder, Path(work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.config, names = self.model.config, get_tensor_name_map(MODEL_ARCH.LLAMA, self.model.config.num_hidden_layers)
        state = {k.removesuffix('.weight'): v.numpy().copy() for k, v in self.model.state_dict().items() if k != 'lm_head.weight' or not self.config.tie_word_embeddings}
        self.names = {names.get_name(k): k for k in state} # llama.cpp's ▸ ours
        self.weights = {n: self.turned(n, state[k]) for n, k in self.names.items()}

    def turned(self, name, w, back=False):
        "Rows of q and k from halves to pairs, as llama.cpp rotates them, or back"
        heads = self.config.num_attention_heads if name.endswith('attn_q') else self.config.num_key_value_heads if name.endswith('attn_k') else 0
        if not heads: return w
        shape = (heads, -1, 2, w.shape[1]) if back else (heads, 2, len(w)//heads//2, w.shape[1])
        return w.reshape(shape).swapaxes(1, 2).reshape(w.shape)

    def write(self, file, weights):
        "A GGUF in BF16, norms in float32"
        c, g = self.config, GGUFWriter(file, 'llama')
        for key, value in dict(block_count=c.num_hidden_layers, context_length=c.max_position_embeddings, embedding_length=c.hidden_size,
                feed_forward_length=c.intermediate_size, head_count=c.num_attention_heads, head_count_kv=c.num_key_value_heads,
                layer_norm_rms_eps=c.rms_norm_eps, rope_dimension_count=c.hidden_size//c.num_attention_heads,
                rope_freq_base=c.rope_parameters['rope_theta'], vocab_size=c.vocab_size, file_type=LlamaFileType.MOSTLY_BF16).items():
            getattr(g, f'add_{key}')(value)
        for n, w in weights.items():
            kind = GGMLQuantizationType.BF16 if w.ndim == 2 else GGMLQuantizationType.F32
            g.add_tensor(f'{n}.weight', quantize(np.ascontiguousarray(w, np.float32), kind), raw_dtype=kind)
        for step in ('write_header_to_file', 'write_kv_data_to_file', 'write_tensors_to_file', 'close'): getattr(g, step)()
        return file

    def gguf(self):
        file = self.work/'bf16.gguf'
        return file if file.exists() else self.write(file, self.weights)

    def importance(self, tokens):
        "Mean square of each input of each matrix, as llama.cpp's imatrix collects it; that of the head apart"
        file = self.work/'imatrix.npz'
        if file.exists(): return dict(np.load(file))
        sums, name_of = {}, {k: n for n, k in self.names.items()}
        def hear(name):
            def hook(module, args): sums[name] = sums.get(name, 0)+args[0].float().square().sum((0, 1)).double().numpy()
            return hook
        body = self.model.model.to(torch.bfloat16) # as the checkpoint is
        for k, m in body.named_modules():
            if isinstance(m, torch.nn.Linear): m.register_forward_pre_hook(hear(name_of[f'model.{k}']))
        with torch.inference_mode():
            for ids in np.split(tokens, len(tokens)//8): hear('head')(None, [body(input_ids=torch.tensor(ids, dtype=torch.long), use_cache=False)[0]])
        found = {f'{n}.weight': (s/tokens.size).astype(np.float32) for n, s in sums.items()}
        np.savez(file, **found)
        return found

    def recipe(self, llama, ftype, imatrix):
        "The types that llama.cpp chooses for a model of this depth and these heads whose width fits"
        rng, file = np.random.default_rng(0), self.work/'fits.gguf'
        if not file.exists(): self.write(file, {n: rng.standard_normal((2, 256) if w.ndim == 2 else w.shape, np.float32) for n, w in self.weights.items()})
        ones = {f'{n}.weight': np.ones(256, np.float32) for n in self.weights} if imatrix else None
        out = llama.quantize(file, self.work/'fitted.gguf', ftype, ones)
        return {t.name.removesuffix('.weight'): t.tensor_type.name for t in GGUFReader(out).tensors}

    def overrides(self, found):
        "Variants for the scorer"
        return {self.names[n]: (lambda w, x=torch.from_numpy(np.ascontiguousarray(self.turned(n, x, True))): x.to(w.device)) for n, x in found.items()}

def listed(names): return [n for n in names.split(',') if n]

def counts(kinds):
    "type ▸ share of the weights"
    total = sum(n for _, n in kinds)
    return {k: round(sum(n for kk, n in kinds if kk == k)/total, 4) for k in sorted({k for k, _ in kinds})}

def read_gguf(s, file):
    "What a GGUF stands for: (overrides, size and what it holds)"
    tensors = GGUFReader(file).tensors
    found = {t.name.removesuffix('.weight'): dequantize(t.data, t.tensor_type) for t in tensors if len(t.shape) == 2}
    kinds = [(t.tensor_type.name, int(t.n_elements)) for t in tensors]
    return s.overrides(found), sum(int(t.n_bytes) for t in tensors), dict(types=counts(kinds), embed=next(t.tensor_type.name for t in tensors if t.name == 'token_embd.weight'),
                                            file_bytes=Path(file).stat().st_size)

def encoded(s, llama, kinds, importance, kept={}):
    "The same with blocks of 256 that run on over four rows"
    matrices, key = {n: w for n, w in s.weights.items() if w.ndim == 2}, lambda n: (n, kinds[n], n in importance)
    def made(n):
        w, i = matrices[n], importance.get(n)
        across = 1 if w.shape[1] % 256 == 0 else 4
        return llama.encode(w.reshape(len(w)//across, -1), kinds[n], None if i is None else np.tile(i, across))
    todo = [n for n in matrices if key(n) not in kept]
    with ThreadPoolExecutor(os.cpu_count()) as pool: kept |= zip(map(key, todo), pool.map(made, todo)) # the library lets go of Python's lock
    found = {n: dequantize(kept[key(n)], GGMLQuantizationType[kinds[n]]).reshape(w.shape) for n, w in matrices.items()}
    nbytes = sum(kept[key(n)].size for n in matrices)+sum(4*w.size for w in s.weights.values() if w.ndim == 1)
    return s.overrides(found), nbytes, dict(types=counts([(kinds[n], w.size) for n, w in s.weights.items()]), embed=kinds['token_embd'])

def against_ours(x, bits, kl_each):
    "The paired difference to OptiQ's rows at the same bytes; above the largest of them, to that one, which has fewer"
    known = json.loads(Path(x.args.ours).read_text())
    if any(known['about'][k] != x.results['about'][k] for k in ('model', 'test')): return None
    rows = our_rows(known['rows'], 'gptq')
    if bits < rows[0]['true_bpw']: return None
    bits = min(bits, rows[-1]['true_bpw'])
    a, b = next((a, b) for a, b in zip(rows, rows[1:]) if a['true_bpw'] <= bits <= b['true_bpw'])
    share, p, q = (bits-a['true_bpw'])/(b['true_bpw']-a['true_bpw']), np.log(a['kl_each']), np.log(b['kl_each'])
    ours = np.exp(p+(q-p)*share)[:len(kl_each)]
    d = np.asarray(kl_each)-ours
    return dict(true_bpw=bits, kl=float(ours.mean()), difference=float(d.mean()), difference_se=float(d.std(ddof=1)/len(d)**.5),
                ratio=float(np.mean(kl_each)/ours.mean()))

def score(x, variants, at_once=5):
    "Rows of name ▸ function that gives (overrides, bytes, more), several at once since each needs the reference"
    tokens = x.test[:x.args.score_n]
    todo = [n for n in variants if x.missing(n) or x.results['rows'][n].get('sequences', 0) < len(tokens)]
    for names in (todo[k:k+at_once] for k in range(0, len(todo), at_once)):
        made, spent = {}, {}
        for n in names:
            print('…', n, flush=True)
            try: made[n], spent[n] = timed(variants[n])
            except Exception as e: x.failed(n, e)
        found = evaluate(x.b, tokens, {n: m[0] for n, m in made.items()})
        for n, (_, nbytes, more) in made.items(): write(x, n, nbytes, found[n], spent[n], **more)

def write(x, name, nbytes, s, seconds, **more):
    se, bits = lambda v: float(v.std(ddof=1)/len(v)**.5), 8*nbytes/x.c.params
    x.results['rows'][name] = dict(true_bpw=bits, bytes=nbytes, kl=float(s.kl.mean()), kl_se=se(s.kl), sequences=len(s.kl), kl_p99=s.kl_p99,
        perplexity=s.perplexity, perplexity_se=s.perplexity_se, flips=1-float(s.agree.mean()), flips_se=se(s.agree), seconds=round(seconds, 1),
        against_ours=against_ours(x, bits, s.kl)) | more | dict(kl_each=[float(f'{v:.6g}') for v in s.kl])
    x.save()
    o = x.results['rows'][name]['against_ours']
    print(f'{name:48} {bits:.3f} bits  KL {s.kl.mean():.5f} ± {se(s.kl):.5f}  flips {1-s.agree.mean():.1%}'+
          (f'  ours {o["kl"]:.5f} at {o["true_bpw"]:.3f}, {o["difference"]:+.5f} ± {o["difference_se"]:.5f}' if o else ''), flush=True)

def part_kquants(x):
    s, llama, imatrix = x.source, x.llama, x.source.importance(x.tokens)
    imatrix = {n: v for n, v in imatrix.items() if n != 'head.weight'}
    def made(ftype, importance):
        file = s.work/f'{ftype}.gguf'
        try: return read_gguf(s, llama.quantize(s.gguf(), file, ftype, importance))
        finally: file.unlink(missing_ok=True)
    rows = {f'llama.cpp {f} imatrix': (lambda f=f: made(f, imatrix)) for f in listed(x.args.kquants)}
    score(x, rows | {f'llama.cpp {f}': (lambda f=f: made(f, None)) for f in listed(x.args.plain)})

def part_across(x):
    s, llama = x.source, x.llama
    imatrix = {n.removesuffix('.weight'): v for n, v in s.importance(x.tokens).items()}
    head = imatrix.pop('head')
    def made(ftype, importance, embed=None):
        kinds = s.recipe(llama, ftype, bool(importance))
        return encoded(s, llama, kinds | (dict(token_embd=embed) if embed else {}), importance)
    rows = {f'across {f} imatrix': (lambda f=f: made(f, imatrix)) for f in listed(x.args.kquants)+listed(x.args.low)}
    rows |= {f'across {f}, embedding {e}, imatrix with head': (lambda f=f, e=e: made(f, imatrix | dict(token_embd=head), e))
             for f, e in (r.split('/') for r in listed(x.args.embeddings))}
    score(x, rows | {f'across {f}': (lambda f=f: made(f, {})) for f in listed(x.args.plain) if f[0] != 'F'})

def part_unsloth(x):
    "Bits by kind of tensor; on MLX attention's output stays as it is and the rest is scaled by the root of its importance first"
    s, importance = x.source, {n.removesuffix('.weight'): v for n, v in x.source.importance(x.tokens).items()}
    importance['token_embd' if s.config.tie_word_embeddings else 'output'] = importance.pop('head')
    bits = lambda n, base: min(b for b in KINDS if b >= base+WIDER[n.split('.')[-1]])
    def gguf(base): return encoded(s, x.llama, {n: KINDS[bits(n, base)] if w.ndim == 2 else 'F32' for n, w in s.weights.items()}, importance)
    def mlx(base, scaling):
        kept = [n for n, w in s.weights.items() if w.ndim == 2 and 'attn_output' not in n]
        plan = make_plan(x.c, {s.names[n]: format_of(x, f'{bits(n, base)}g64') for n in kept})
        rounded = overrides_of(plan)
        found = {s.names[n]: scaled(rounded[s.names[n]], importance[n] if scaling and n not in ('token_embd', 'output') else None) for n in kept}
        return found, plan.nbytes, dict(counts={str(k): n for k, n in plan.counts().items()}, embed=str(plan[x.c.units[0].path]))
    bases = [int(b) for b in listed(x.args.bases)]
    score(x, {f"Unsloth's rules, GGUF, base {b}": (lambda b=b: gguf(b)) for b in bases} |
             {f"Unsloth's rules, MLX, base {b}{how}": (lambda b=b, how=how: mlx(b, not how)) for b in bases for how in ('', ', not scaled')})

def scaled(rounding, importance):
    "A rounding of columns that are scaled before it and back after it, as a norm or the rows of the matrix before could take the inverse"
    if importance is None: return rounding
    r = np.sqrt(np.maximum(importance, 1e-8))
    r = torch.from_numpy(r/np.sqrt(r.max()*r.min()))
    return lambda w: rounding((w.float()*r.to(w.device)).to(w.dtype)).float()/r.to(w.device)

def part_again(x):
    "The paired difference to today's rows of OptiQ, for every row that is there"
    for r in x.results['rows'].values():
        if r.get('against_ours'): r['against_ours'] = against_ours(x, r['true_bpw'], r['kl_each'])

def part_join(x):
    "Rows of other files of this script, scored on the same text; those of more sequences stay"
    for file in listed(x.args.joined):
        other, here = json.loads(Path(file).read_text()), x.results['rows']
        for k in ('model', 'calibration', 'test'):
            if other['about'][k] != x.results['about'][k]: raise SystemExit(f'{file} was measured on another {k}')
        for n, r in other['rows'].items():
            if r.get('sequences', 0) > here.get(n, {}).get('sequences', 0): here[n] = r | {k: other['about'][k] for k in ('device', 'date')}
        about = x.results['about']
        about['command'] = [*(about['command'] if isinstance(about['command'], list) else [about['command']]), other['about']['command']]
        for k in ('device', 'note', 'date'): about[k] = together([about[k], other['about'][k]])

def part_autoround(x):
    "What autoround.py wrote; the embedding, which AutoRound leaves as it is, at several widths by min-max"
    for recipe, out in (pair.split('=') for pair in listed(x.args.rounded)):
        for file in sorted(Path(out).glob('*/peer.json')):
            about, name = json.loads(file.read_text()), file.parent.name.split('-')[0] if file.parent.name[0] != 'W' else file.parent.name
            score(x, {f'AutoRound {name}, {recipe}, embedding {e}': (lambda e=e: read_mlx(x, file.parent, e, about)) for e in listed(x.args.widths)})

def part_oq(x):
    "oMLX's oQ on our calibration text: its plan, rounded by min-max (oQ) or clipped by importance (oQe)"
    import importlib.util
    spec = importlib.util.spec_from_file_location('oq', x.args.oq)
    spec.loader.exec_module(oq := importlib.util.module_from_spec(spec))
    imatrix = {x.source.names.get(n.removesuffix('.weight')): v for n, v in x.source.importance(x.tokens).items()}
    scores, shapes = {}, {u.path: u.shape for u in x.c.units}
    formats = {b: format_of(x, f'{b}g64') for b in (2, 3, 4, 5, 6, 8)}
    for level in listed(x.args.levels):
        level, _, target = level.partition('@')
        level, caps = float(level), oq._bpw_targets_for_level(float(level))
        def plan():
            base = oq._base_bits_for_level(level)
            if base not in scores: scores[base] = block_errors(x, x.tokens[:32], uniform(x.c, f'{base}g64'))
            config = x.c.config | dict(_oq_use_budget_plan=True, _oq_sensitivity_map={str(i): v for i, v in enumerate(scores[base])})
            boosts = oq._build_quant_plan(shapes, config, level, *((float(target), float(target)+.1) if target else caps)).boost_map
            return make_plan(x.c, {p: formats[boosts[p]['bits'] if p in boosts else base] for p in shapes})
        def made(weighted):
            found = plan()
            f = {p: (lambda w, p=p, b=fmt.bits: clipped(w, b, imatrix.get(p))) for p, fmt in found.items()} if weighted else overrides_of(found)
            return f, found.nbytes, dict(counts={str(k): n for k, n in found.counts().items()}, embed=str(found[x.c.units[0].path]), target=target or caps)
        name = f'{level:g}'+(f' at {target}' if target else '')
        score(x, {f'oMLX oQ{name}e': lambda: made(True), f'oMLX oQ{name}': lambda: made(False)})

def block_errors(x, tokens, plan):
    "oQ's measure: mean squared error of a block's output when all of it is at the base width, over its mean square"
    total = np.zeros((2, x.b.n_blocks))
    for ids in np.split(tokens, len(tokens)//16):
        states = x.b.embed(ids)
        for i in range(x.b.n_blocks):
            rounded = x.b.run_block(i, states, overrides_of({p: f for p, f in plan.items() if f'.layers.{i}.' in p}))
            states = x.b.run_block(i, states)
            total[:, i] += float((states-rounded).square().mean()), float(states.square().mean())
    return (total[0]/total[1]).tolist()

def clipped(w, bits, importance, group=64):
    "oQe's rounding: of 14 affine grids that share an edge with the group, that with the least error weighted by importance"
    g, n, best = w.float().reshape(len(w), -1, group), 2**bits-1, None
    h = torch.ones_like(g[:1]) if importance is None else torch.from_numpy(importance).to(w.device).clamp(min=1e-8).reshape(1, -1, group)
    low, high = g.amin(-1, keepdim=True), g.amax(-1, keepdim=True)
    for edge, sign in ((high, -1), (low, 1)):
        step = ((high-low)/n).clamp(min=1e-7)*sign
        k = (edge/step).round()
        step, bias = torch.where(k != 0, edge/k, step), torch.where(k == 0, 0., edge)
        for factor in (1.,) if importance is None else (.5, .625, .75, .875, 1., 1.125, 1.25):
            s = step*factor
            codes = ((g-bias)/s).round_().clamp_(0, n)
            error = (h*(g-(codes*s+bias)).square_()).sum(-1, keepdim=True)
            out = codes*s.bfloat16().float()+bias.bfloat16().float()
            best = (error, out) if best is None else (torch.minimum(error, best[0]), torch.where(error < best[0], out, best[1]))
    return best[1].reshape(w.shape)

def read_mlx(x, folder, embed, about):
    "Variant of a saved MLX checkpoint, with what it left as it is, the embedding and an own head, in another format"
    import mlx.core as mx
    folder = next(Path(folder).rglob('config.json')).parent
    tensors = {k: v for f in folder.glob('*.safetensors') for k, v in mx.load(str(f)).items()}
    entries, found = json.loads((folder/'config.json').read_text())['quantization'], {}
    nbytes = sum(t.nbytes for t in tensors.values())
    for p in (k.removesuffix('.scales') for k in tensors if k.endswith('.scales')):
        e = entries.get(p) or entries
        w = mx.dequantize(tensors[f'{p}.weight'], *(tensors[f'{p}.{k}'].astype(mx.float32) for k in ('scales', 'biases')), group_size=e['group_size'], bits=e['bits'])
        found[p] = lambda w, x=torch.from_numpy(np.array(w)): x.to(w.device)
    bits = sorted(str(e['bits']) for e in entries.values() if isinstance(e, dict))
    if embed != 'as it is':
        left = {u.path: format_of(x, embed) for u in x.c.units if u.path not in found}
        plan = make_plan(x.c, left)
        found |= overrides_of({p: plan[p] for p in left})
        nbytes += plan.nbytes-make_plan(x.c, {}).nbytes
    return found, nbytes, dict(counts={b: bits.count(b) for b in sorted(set(bits))}, embed=embed, **about)

def format_of(x, name): return next(iter(uniform(x.c, name).values()))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', required=True)
    p.add_argument('--calibration', required=True)
    p.add_argument('--test', required=True)
    p.add_argument('--only', default='kquants,across,autoround,oq')
    p.add_argument('--llama', help='folder of libllama and libggml-base')
    p.add_argument('--kquants', default=KQUANTS, help="llama.cpp's names, with an importance matrix")
    p.add_argument('--plain', default=f'F16,Q8_0,{KQUANTS}', help='without')
    p.add_argument('--low', default=LOW, help='across only, with an importance matrix')
    p.add_argument('--embeddings', default=EMBEDDINGS, help='recipe/type of the embedding')
    p.add_argument('--bases', default='3,4,5', help="of Unsloth's rules")
    p.add_argument('--rounded', default='', help='RECIPE=FOLDER of what autoround.py wrote, comma separated')
    p.add_argument('--widths', default='6g64,4g64,3g64', help="of AutoRound's embedding; `as it is` leaves it")
    p.add_argument('--joined', default='', help='files of this script, comma separated')
    p.add_argument('--oq', help="oMLX's oq.py")
    p.add_argument('--levels', default='3,3.5,4,5,3@4,4@5', help='of oQ; level@bits gives it another target')
    p.add_argument('--ours', default='nbs/results/peers-smollm2.json', help='rows to compare with')
    p.add_argument('--n', type=int, default=128, help='calibration sequences')
    p.add_argument('--seq-len', type=int, default=256)
    p.add_argument('--test-n', type=int, default=64, help='test sequences of 256 tokens')
    p.add_argument('--score-n', type=int, default=64, help='of these, how many are scored; a row that is there with fewer is measured again')
    p.add_argument('--note', default='', help='kept with the results')
    p.add_argument('--work', default='kquants', help='folder for GGUF files and the importance matrix')
    p.add_argument('-o', '--output', default='kquants.json')
    args = p.parse_args()
    args.targets = '4'
    x = Bench(args)
    x.reference()
    x.source, x.llama = Source(args.model, args.work), Llama(args.llama) if args.llama else None
    x.results['about'] |= dict(scored=f'{args.score_n} sequences', gguf=version('gguf')) | ({'llama.cpp': x.llama.version} if x.llama else {})
    for part in args.only.split(','):
        _, s = timed(lambda: globals()[f'part_{part}'](x))
        x.results['seconds'][part] = round(s, 1)
        x.save()
        print(f'== {part}: {s:.0f} s', flush=True)

if __name__ == '__main__': main()
