"""Every model that the loaders open, as a tiny random checkpoint, taken down the whole road: one line a family.

    python bench/families.py [--loader mlx-lm,mlx-vlm,special] [--only gemma4,rwkv7] [--backend mlx,torch] [--long]
                             [--seconds 120] [--again] [--quick] [-o nbs/results/families.json]

A text model of mlx-lm or a vision-language model of mlx-vlm is a line; so is each special form of
`bench/families.json`, which holds a small configuration of our own for each of them. A model file without one is
reported as such, so a new release of the loaders is one command away. Where transformers has the class, the
checkpoint has the names that transformers saves; elsewhere, or where the loader does not take these, those of the
loader itself. All weights are random and float32, so that equal means equal; nothing is said about quality.

Each line runs in a process of its own under a time limit. Rows are added to the result file as they come; what it
holds already is not run again without `--again`; each row says of which commit and day it is. What a family must do:

`plain`    the loader itself opens the checkpoint and runs it: what fails here is the loader's own refusal
`list`     units and blocks
`whole`    every stored tensor has a place, or its loss is said
`tokens`   sequences start as the tokenizer starts a text
`replay`   block by block equals the model's own forward pass
`streams`  two stacked streams equal one by one
`gradient` finite, and something
`effect`   every unit at 2 bits changes the output, if it does so in the library
`plan`     5 bits per weight
`search`   all units of the plan rounded by what they hear on this text; each that has an effect is heard
`gptq`     the same, each unit on states that carry the errors of those before it
`save`     converted with min-max rounding, checked tensor by tensor
`reload`   the plain library opens it and gives the same logits
`cache`    layout, a sweep at 4 bits, a quantized cache in generation

Pictures are random numbers in the shape that a model's own processor gives them, since a processor is a file of its
own for each family; models that see are opened by `mlx_vlm.utils.load_model` for the same reason. PyTorch replays text
models only. A row is `refused` where the library alone cannot do the step either, and says whose refusal it is;
it `fails` where the library can. `where` is the innermost place in the package that the error passed.
"""
import argparse
import contextlib
import copy
import faulthandler
import gc
import importlib
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import date
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name
from queue import Empty
from types import SimpleNamespace

import numpy as np

os.environ.setdefault('MLX_DISABLE_COMPILE', '1') # on a CPU every compiled function costs seconds of a C++ compiler
sys.path.append(str(Path(__file__).parents[1]/'tools'))
from blas import fast_blas

fast_blas()

from optiq.backends.open import APART, apart, open_backend # all that we take from the package stands here
from optiq.backends.replay import _joinable
from optiq.calibration import samples_of, token_batch
from optiq.convert import convert
from optiq.evals.perplexity import overrides_of
from optiq.report import machine
from optiq.measure.gradient import gradient_sweep
from optiq.knapsack import allocate
from optiq.draft import _reader_of
from optiq.plan import Plan, uniform
from optiq.kv.cache import generate_with_mixed_kv, mixed_caches
from optiq.kv.config import kv_config, read_kv_config
from optiq.kv.layout import kv_layout
from optiq.kv.sweep import kv_sweep
from optiq.folder import read_header
from optiq.models import Checkpoint
from optiq.rounding import as_overrides, round_model
from optiq.sensitivity import kl_sweep
from optiq.statistics import Statistics
from optiq.material.configs import _merged
from optiq.material.tiny import _PROSE, _draw, write_json, _write_tokenizer

HERE = Path(__file__).parent
TABLE, RESULT = HERE/'families.json', HERE.parent/'nbs/results/families.json'
CLOSE = 1e-3 # of the logits' standard deviation: how far equal may be off in float32
BUILDS = 'transformers does not build it'
LOADER = {'mlx-lm': 'mlx-lm', 'mlx-vlm': 'mlx-vlm', 'special': 'mlx-lm'}
T = 32 # tokens of a sequence, twice the sliding windows of the table

# ── the table ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def read_table() -> dict: return json.loads(TABLE.read_text())

def resolved(entry, parts: dict):
    "A configuration with the parts that it is made of, wherever it says `_of`"
    if not isinstance(entry, dict): return entry
    out = {}
    for name in entry.get('_of', ()): out = _merged(out, resolved(parts[name], parts))
    return _merged(out, {k: resolved(v, parts) for k, v in entry.items() if k != '_of'})

def stripped(entry):
    "Without what it says under `_drop`"
    if not isinstance(entry, dict): return entry
    gone = {*entry.get('_drop', ()), '_drop'}
    if entry.get('rope_parameters'): gone |= {k for k in ('rope_scaling',) if entry.get(k) is None} # said once
    return {k: stripped(v) for k, v in entry.items() if k not in gone}

def config_of(loader: str, family: str, table: dict) -> tuple: # config.json, what the runner is told
    entry = {'_of': ['text']} | table[loader][family]
    whole = stripped(resolved(entry, table['parts']))
    told = {k[1:]: v for k, v in whole.items() if k.startswith('_')}
    config = {k: v for k, v in whole.items() if not k.startswith('_')}
    return dict(model_type=family, torch_dtype='float32') | config, told

def model_files(loader: str) -> list:
    "The loader's model files that hold a model"
    if loader == 'mlx-lm':
        root = Path(importlib.util.find_spec('mlx_lm').origin).parent/'models'
        return sorted(f.stem for f in root.glob('*.py') if re.search(r'^class Model\(', f.read_text(), re.M))
    root = Path(importlib.util.find_spec('mlx_vlm').origin).parent/'models'
    return sorted(f.parent.name for f in root.glob('*/__init__.py') if takes_pictures(f.parent))

def takes_pictures(folder: Path) -> bool:
    "Whether a model of mlx-vlm takes text and images: it sees, and is called with tokens and pixels"
    text = ''.join(f.read_text() for f in folder.glob('*.py'))
    sees = (folder/'vision.py').exists() or re.search('VisionModel|vision_tower|vision_model', text)
    called = re.search(r'class Model\(.*?def __call__\((.*?)\)', text, re.S)
    return bool(sees and 'LanguageModel' in text and 'logits' in text and called and 'pixel_values' in called[1]
                and re.search(r'\binputs?(_ids)?\b', called[1]))

# ── a checkpoint ──────────────────────────────────────────────────────────────────────────────────────────────────────

def values(name: str, shape: tuple, model_type: str) -> np.ndarray:
    "Random weights, float32; experts that are stored as one tensor are as wide as each of them"
    x = np.concatenate([*_draw(name, shape, model_type), np.zeros(0, np.float32)]).reshape(shape)
    return x*np.float32(np.sqrt(shape[1])) if len(shape) == 3 and re.search('expert|switch', name) else x

def transformers_class(config: dict, vision: bool = False):
    "(configuration, class) of transformers; None if there is none"
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    if config['model_type'] not in CONFIG_MAPPING_NAMES: return None
    native = AutoConfig.for_model(**copy.deepcopy(config))
    table = (AutoModelForImageTextToText if vision else AutoModelForCausalLM)._model_mapping
    return (native, table[type(native)]) if type(native) in table.keys() else None

def write_native(out: Path, config: dict, found: tuple):
    "The weights, named as transformers saves them"
    import torch
    native, kind = found
    if kind.config_class is not type(native): native = native.get_text_config()
    native._attn_implementation = 'eager'
    try: model = kind(native).float()
    except Exception as e: raise Wrong(f'{BUILDS}: {one_line(e)}') from e
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.is_floating_point(): p.copy_(torch.from_numpy(values(name, tuple(p.shape), config['model_type'])))
    model.tie_weights()
    model.save_pretrained(out)
    config['architectures'] = [kind.__name__]

def write_mlx(out: Path, config: dict, vision: bool):
    "The weights, named as the loader has them"
    import mlx.core as mx
    from mlx.utils import tree_flatten
    model = mlx_model(config, vision)
    def new(k, v):
        known = mx.issubdtype(v.dtype, mx.floating)
        return mx.array(values(k, tuple(v.shape), config['model_type'])) if known else v
    arrays = {k: new(k, v) for k, v in tree_flatten(model.parameters())}
    mx.save_safetensors(str(out/'model.safetensors'), arrays, {'format': 'mlx'})

def mlx_model(config, vision):
    if vision:
        from mlx_vlm.utils import get_model_and_args, update_module_configs
        arch, _ = get_model_and_args(config=copy.deepcopy(config))
        given = copy.deepcopy(config) # some classes move entries about in it, and the loader reads these
        args = arch.ModelConfig.from_dict(given)
        return arch.Model(update_module_configs(args, arch, given, ['text', 'vision', 'perceiver', 'projector', 'audio']))
    from mlx_lm.utils import _get_classes
    model, args = _get_classes(config)
    return model(args.from_dict(copy.deepcopy(config)))

def put_bos(out: Path, token: str = '<|endoftext|>'):
    "A tokenizer that starts every text with a token of its own, as those of Gemma and Llama 3 do"
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    file = str(out/'tokenizer.json')
    t = Tokenizer.from_file(file)
    t.post_processor = TemplateProcessing(single=f'{token} $A', pair=f'{token} $A {token} $B',
                                          special_tokens=[(token, t.token_to_id(token))])
    t.save(file)
    about = json.loads((out/'tokenizer_config.json').read_text())
    write_json(out/'tokenizer_config.json', about | dict(bos_token=token))

def put_mxfp4(out: Path):
    "Experts as gpt-oss has them: two codes in a byte, a power of two for each 32 of them"
    from safetensors.numpy import load_file, save_file
    found, rng = load_file(out/'model.safetensors'), np.random.default_rng(0)
    for name in [n for n in found if re.search(r'experts\.(gate_up|down)_proj$', n)]:
        experts, ins, outs = found.pop(name).shape
        found[name+'_blocks'] = rng.integers(0, 256, (experts, outs, ins//32, 16), dtype=np.uint8)
        found[name+'_scales'] = rng.integers(120, 123, (experts, outs, ins//32), dtype=np.uint8)
    save_file(found, out/'model.safetensors', {'format': 'pt'})

def matrices(found: dict) -> list: # names, without '.weight', of what other libraries pack: matrices of blocks, routers apart
    named = [n[:-7] for n in found if re.search(r'layers\..*(proj|fc)\.weight$', n) and found[n].ndim == 2]
    return [n for n in named if 'visual' not in n and 'vision' not in n]

def put_fp8(out: Path):
    "Eight bits, and a scale for each block of 128 × 128, as DeepSeek has them"
    import torch
    from safetensors.torch import load_file, save_file
    found = load_file(out/'model.safetensors')
    for name in matrices(found):
        w = found[f'{name}.weight']
        tall, wide = (-n % 128 for n in w.shape)
        blocks = torch.nn.functional.pad(w, (0, wide, 0, tall)).unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
        scale = blocks.abs().amax((1, 3))/448
        whole = (blocks/scale[:, None, :, None]).flatten(2).flatten(0, 1)[:w.shape[0], :w.shape[1]]
        found[f'{name}.weight'], found[f'{name}.weight_scale_inv'] = whole.contiguous().to(torch.float8_e4m3fn), scale
    save_file(found, out/'model.safetensors', {'format': 'pt'})

def put_awq(out: Path, group: int = 64, order=(0, 4, 1, 5, 2, 6, 3, 7)):
    "Four bits, eight of them in a word and in AutoAWQ's order, with scales and zero points"
    from safetensors.numpy import load_file, save_file
    found = load_file(out/'model.safetensors')
    def packed(x): # (n, out) codes
        return sum(x.astype(np.uint32).reshape(len(x), -1, 8)[..., k] << np.uint32(4*at) for k, at in enumerate(order)).view(np.int32)
    for name in matrices(found):
        w = found.pop(f'{name}.weight').T # (in, out)
        g = w.reshape(-1, group, w.shape[1])
        scale = np.maximum(g.max(1)-g.min(1), 1e-6)/15
        zero = np.clip(np.round(-g.min(1)/scale), 0, 15)
        codes = np.clip(np.round(g/scale[:, None])+zero[:, None], 0, 15).reshape(w.shape)
        found |= {f'{name}.qweight': packed(codes), f'{name}.qzeros': packed(zero), f'{name}.scales': scale}
    save_file(found, out/'model.safetensors', {'format': 'pt'})

def put_gptq(out: Path, group: int = 64):
    "Four bits, eight of them in a word along the columns, with the group of each column beside them"
    from safetensors.numpy import load_file, save_file
    found = load_file(out/'model.safetensors')
    def packed(x): # (8n, out) codes
        return sum(x.astype(np.uint32).reshape(-1, 8, x.shape[1])[:, k] << np.uint32(4*k) for k in range(8)).view(np.int32)
    for name in matrices(found):
        w = found.pop(f'{name}.weight').T # (in, out)
        g = w.reshape(-1, group, w.shape[1])
        scale = np.maximum(abs(g).max(1), 1e-6)/7
        codes = np.clip(np.round(g/scale[:, None])+8, 0, 15).reshape(w.shape)
        zeros = packed(np.full((w.shape[1], len(g)), 7)).T # one less than they are
        found |= {f'{name}.qweight': packed(codes), f'{name}.qzeros': np.ascontiguousarray(zeros), f'{name}.scales': scale,
                  f'{name}.g_idx': (np.arange(len(w))//group).astype(np.int32)}
    save_file(found, out/'model.safetensors', {'format': 'pt'})

def put_int4(out: Path, group: int = 32):
    "Four bits in words, as compressed-tensors packs them"
    from safetensors.numpy import load_file, save_file
    found = load_file(out/'model.safetensors')
    for name in matrices(found):
        w = found.pop(f'{name}.weight')
        g = w.reshape(len(w), -1, group)
        scale = np.maximum(abs(g).max(-1), 1e-6)/7
        codes = (np.clip(np.round(g/scale[..., None]), -8, 7)+8).reshape(len(w), -1, 8).astype(np.uint32)
        words = sum(codes[..., k] << np.uint32(4*k) for k in range(8)).view(np.int32)
        found |= {f'{name}.weight_packed': words, f'{name}.weight_scale': scale, f'{name}.weight_shape': np.array(w.shape)}
    save_file(found, out/'model.safetensors', {'format': 'pt'})

def put_nvfp4(out: Path):
    "NVFP4 as ModelOpt stores it: two codes in a byte, a scale for 16 of them, and one for the whole"
    import mlx.core as mx
    import torch
    from safetensors.torch import load_file, save_file
    found = load_file(out/'model.safetensors')
    for name in matrices(found):
        codes, scales = mx.quantize(mx.array(found[f'{name}.weight'].numpy()), 16, 4, 'nvfp4')
        found[f'{name}.weight'] = torch.from_numpy(np.array(codes).view(np.uint8))
        found[f'{name}.weight_scale'] = torch.from_numpy(np.array(scales)).view(torch.float8_e4m3fn)
        found[f'{name}.weight_scale_2'] = torch.tensor(.75)
    save_file(found, out/'model.safetensors', {'format': 'pt'})

def resize(changes: dict): # dotted name ▸ new value, or what becomes of what is called: {'_with': arguments on top}, {'_only': items}
    "Sizes that a loader has in its code and no configuration holds; this process has nothing else to do"
    for name, value in changes.items():
        path, _, last = name.rpartition('.')
        at, more = resolve_name(path), value if isinstance(value, dict) else {}
        def instead(*args, f=getattr(at, last), more=more, **named):
            found = f(*args, **named | more.get('_with', {}))
            return [[x[k] for k in keep] for x, keep in zip(found, more['_only'])] if '_only' in more else found
        setattr(at, last, instead if more else value)

PACKED = dict(mxfp4=put_mxfp4, fp8=put_fp8, awq=put_awq, gptq=put_gptq, int4=put_int4, nvfp4=put_nvfp4)

def put_draft(out: Path, config: dict, prefix: str):
    "A head that drafts tokens, in random numbers: as mlx-vlm reads it, or a copy of the last block if it has no class for it"
    from mlx.utils import tree_flatten
    from mlx_vlm.speculative.drafters.mtp_split import get_mtp_splitter
    from mlx_vlm.utils import get_model_and_args
    from safetensors.numpy import load_file, save_file
    found, reader = load_file(out/'model.safetensors'), get_mtp_splitter(source_config=copy.deepcopy(config))
    last, arch = f"layers.{config.get('num_hidden_layers', 0)-1}.", None
    if reader:
        text = reader.read_text_config(copy.deepcopy(config))
        said = dict(model_type=reader.output_model_type, text_config=text, block_size=2) | reader.extra_config(text)
        arch, _ = get_model_and_args(said)
    if not hasattr(arch, 'Model'): own = {k.split(last)[1]: v for k, v in found.items() if last in k}
    else:
        shapes = {k: v.shape for k, v in tree_flatten(arch.Model(arch.ModelConfig.from_dict(said)).parameters())}
        own = {k: values(k, tuple(s), config['model_type']) for k, s in shapes.items()}
    own = {re.sub(r'^(mtp|mtp_block)\.', '', k).replace('shared_head_norm', 'shared_head.norm'): v for k, v in own.items()}
    save_file(found | {prefix+k: v for k, v in own.items()}, out/'model.safetensors', {'format': 'pt'})

def write_checkpoint(out: Path, config: dict, told: dict, form: str, vision: bool):
    "A folder as the hub has it"
    out.mkdir(parents=True)
    found = transformers_class(config, vision) if form == 'hub' else None
    write_native(out, config, found) if found else write_mlx(out, config, vision)
    _write_tokenizer(out)
    if 'bos' in told: put_bos(out)
    if 'pack' in told: PACKED[told['pack']](out)
    if 'draft' in told: put_draft(out, config, told['draft'])
    write_json(out/'config.json', config)
    for n in ('generation_config.json',): (out/n).unlink(missing_ok=True)

# ── the steps ─────────────────────────────────────────────────────────────────────────────────────────────────────────

class Wrong(Exception): "What a step finds to be so"

def near(x, y, what: str, close: float = CLOSE) -> float:
    "How far apart, in standard deviations of the second; raises Wrong"
    x, y = (np.asarray(a, dtype=np.float64) for a in (x, y))
    if x.shape != y.shape: raise Wrong(f'{what}: shapes {x.shape} and {y.shape}')
    if not np.isfinite(y).all(): raise Wrong(f'{what}: not finite')
    off = float(abs(x-y).max()/(y.std()+1e-30))
    if not off < close: raise Wrong(f'{what}: off by {off:.2g} of the spread')
    return off

def as_numpy(x):
    import mlx.core as mx
    return np.array(x.astype(mx.float32)) if isinstance(x, mx.array) else x.detach().float().cpu().numpy()

def plain_logits(model, batch, vision=False) -> np.ndarray:
    "What the library's own model answers"
    import mlx.core as mx
    if not vision: return as_numpy(model(mx.array(batch)))
    given = {k: mx.array(v if v.dtype.kind in 'fb' else v.astype(np.int32)) for k, v in batch.items() if k != 'scored'}
    ids, pixels, mask = (given.pop(k, None) for k in ('input_ids', 'pixel_values', 'attention_mask'))
    found = model.get_input_embeddings(ids, pixels, mask=mask, **given).to_dict() # as mlx-vlm generates
    found = {k: v for k, v in found.items() if v is not None}
    out = model.language_model(ids, inputs_embeds=found.pop('inputs_embeds'), cache=None, **given | found)
    return as_numpy(getattr(out, 'logits', out))

def open_plain(folder: Path, vision: bool):
    if vision:
        from mlx_vlm.utils import load_model
        return load_model(folder)
    from mlx_lm.utils import load_model
    return load_model(folder)[0]

def plain(m):
    "The library alone, in the first form that it opens"
    errors = []
    for form in ([m.told['form']] if 'form' in m.told else ['hub', 'mlx']):
        m.config, m.form = copy.deepcopy(m.asked), form
        shutil.rmtree(m.folder, ignore_errors=True)
        try:
            if form == 'hub' and not transformers_class(m.config, m.vision): continue
            write_checkpoint(m.folder, m.config, m.told, form, m.vision)
            model = open_plain(m.folder, m.vision)
            m.batch = batch_of(m, model)
            m.plain = plain_logits(model, m.batch[0] if m.vision else m.batch, m.vision)
            if not np.isfinite(m.plain).all(): raise Wrong('logits are not finite')
            m.hub_error = errors[0] if errors else None
            return f'{form} names' + (f'; in those of transformers: {errors[0]}' if errors else '')
        except (Exception, SystemExit) as e: errors.append(one_line(e)); m.trace = traceback.format_exc()
    raise Wrong('; '.join(e[:200] for e in dict.fromkeys(reversed(errors))))

def batch_of(m, model):
    "Two rows of random tokens, or two samples with a picture"
    rng = np.random.default_rng(0)
    if m.vision: return [sample(m, rng) for _ in range(2)]
    n = m.told.get('tokens', T)
    many = m.config.get('text_config', m.config).get('vocab_size', 512)
    return rng.integers(11, min(many, 512), (1 if n > 1024 else 2, n)).astype(np.int32)

def sample(m, rng) -> dict:
    "A picture's tokens between words, the picture, and what else the table says"
    s = {'token': 5, 'tokens': 0} | m.told.get('sample', {})
    words = rng.integers(11, 200, (2, 6))
    ids = np.array([[*words[0], *[s['token']]*s['tokens'], *words[1]]])
    if 'before' in s: ids = np.array([[*s['before'], *words[0], *[s['token']]*s['tokens'], *words[1]]])
    out = dict(input_ids=ids)
    if 'pixels' in s: out['pixel_values'] = rng.standard_normal(s['pixels']).astype(np.float32)
    out |= {k: np.array(v) for k, v in s.get('more', {}).items()}
    out |= {k: np.ones(v, np.int32) for k, v in s.get('ones', {}).items()}
    out['attention_mask'] = np.ones_like(ids)
    if 'mark' in s: out[s['mark']] = ids == s['token']
    return out | dict(scored=(np.arange(ids.shape[1]) >= ids.shape[1]-s.get('scored', 6))[None].astype(np.int32))

def from_end(s) -> np.ndarray: return np.flatnonzero(s['scored'])-s['scored'].size # a picture may grow in the model

def listed(m):
    m.c = Checkpoint(m.folder, model_type='vlm' if m.vision else 'auto')
    if not m.c.units: raise Wrong('no units')
    m.units, m.blocks = len(m.c.units), m.c.n_blocks
    return f'{m.units} units in {" + ".join(map(str, m.c.blocks.values()))} blocks, model type {m.c.model_type}'

def whole(m):
    "Elements in the files against those of the listing; what is only there twice is no loss"
    if 'quantization_config' in m.config: return 'stored packed'
    stored = {k: int(np.prod(t['shape'])) for f in m.c.files for k, t in read_header(f).items()}
    lost = sum(stored.values())-m.c.params
    odd = {k: n for k, n in stored.items() if re.search(r'(^|\.)(mtp|nextn|draft)', k) or k.startswith(m.told.get('draft', ' '))}
    if odd and lost >= sum(odd.values()):
        if not m.c.left_out: raise Wrong(f'{len(odd)} tensors such as {min(odd)} are dropped in silence')
        return f'left out, and named in the plan: {", ".join(m.c.left_out)}'
    if lost: return f'{lost:,} of {sum(stored.values()):,} stored numbers have no place in the model'

def tokens(m):
    "Whether sequences start as texts do"
    t = m.c.tokenizer
    first = [i for i in t.encode('a')[:1] if i in t.all_special_ids]
    rows = token_batch([_PROSE.replace('\n', ' ')]*8, t, 2, 32)
    if first and not (rows[:, 0] == first[0]).all(): raise Wrong(
        f'the tokenizer starts a text with {t.decode(first)}, and calibration sequences do not')
    return f'{t.decode(first)} first' if first else 'nothing added'

def opened(m):
    m.b = open_backend(m.c, m.backend)

def replay(m):
    opened(m)
    b, batch = m.b, m.batch
    if not b.stacks:
        offs, rows = [], from_end(batch[0])
        near(as_numpy(b.forward(batch[0])), m.plain[:, rows], 'our forward pass against the library')
        for s in batch:
            passed, z = b.record(s)
            offs.append(near(as_numpy(z), as_numpy(b.forward(s)), 'recorded against the forward pass'))
            z = b.head(passed.at(b.n_blocks-1))
            offs.append(near(as_numpy(z), as_numpy(b.forward(s)), 'replayed against the forward pass'))
        return f'off by {max(offs):.1g}'
    own = as_numpy(b.logits(batch))
    if m.backend == 'mlx': near(own, m.plain, 'our forward pass against the library')
    else: m.apart = float(abs(own-m.plain).max()/m.plain.std()) # of the libraries, in full precision
    x = b.embed(batch)
    for i in range(b.n_blocks): x = b.run_block(i, x)
    return f'off by {near(as_numpy(b.head(x)), own, "replay against the forward pass"):.1g}'

def streams(m):
    "The reference and a perturbed copy, together and one by one"
    b, batch = m.b, m.batch
    if not b.stacks: return 'one sample at a time'
    u = next(u for u in b.checkpoint.units if u.block == 0 and u.shape[-1] % 32 == 0)
    change, first = overrides_of({u.path: parse('2g32')}), b.embed(batch)
    alone = [b.run_block(0, first), b.run_block(0, first, change)]
    if not _joinable(*alone): return 'a change of block 0 lasts, so its streams go one by one'
    both = b.joined(alone)
    for i in range(1, b.n_blocks):
        alone, both = [b.run_block(i, x) for x in alone], b.run_block(i, both)
    z = [as_numpy(b.head(x)) for x in alone]
    return f'off by {near(as_numpy(b.head(both)), np.concatenate(z), "stacked against one by one"):.1g}'

def parse(name):
    from optiq.formats import parse_format
    return parse_format(name)

def gradient(m):
    if not m.b.stacks: return 'not offered for models of several parts'
    sweep = gradient_sweep(m.b, m.batch, ['2g32'])
    kl = {p: float(v.mean()) for (p, _), v in sweep.values.items()}
    bad = [p for p, v in kl.items() if not np.isfinite(v)]
    if bad: raise Wrong(f'{len(bad)} of {len(kl)} units have no finite estimate, such as {bad[0]}')
    none = [p for p, v in kl.items() if v == 0]
    ours = [p for p in none if m.vision or steep(m, p)]
    if ours: raise Wrong(f'{len(ours)} of {len(kl)} units have a gradient of 0: {", ".join(kinds(ours))}')
    return f'{len(kl)} units' + (f'; 0 in the library too: {", ".join(kinds(none))}' if none else '')

def steep(m, path) -> bool:
    "Whether the library's own gradient of a sum of logits by this weight is not 0"
    import mlx.core as mx
    model = open_plain(m.folder, False)
    layer = dict(model.named_modules())[path]
    toward = mx.random.normal(m.plain.shape, key=mx.random.key(0))
    def total(w):
        layer.weight = w
        return (model(mx.array(m.batch)).astype(mx.float32)*toward).sum()
    return bool((mx.grad(total)(layer.weight) != 0).any())

def reached(m, path) -> bool:
    "Whether the library's own logits change with this weight, by more than from one opening to the next"
    def answers(model): # where a picture stands, nothing is scored
        if not m.vision: return [plain_logits(model, m.batch)]
        return [plain_logits(model, s, True)[:, from_end(s)] for s in m.batch]
    if not hasattr(m, 'twice'): m.twice = [answers(open_plain(m.folder, m.vision)) for _ in range(2)]
    model = open_plain(m.folder, m.vision)
    layer = dict(model.named_modules())[path]
    layer.weight = -layer.weight
    return any((abs(z-x) > 10*abs(y-x).max()).any() for z, x, y in zip(answers(model), *m.twice))

def kinds(paths) -> list: return sorted({re.sub(r'\.\d+\.', '.*.', p) for p in paths})[:6]

def effect(m):
    batch = m.batch[:1] if m.told.get('tokens', T) > 1024 or m.vision else m.batch
    m.sweep = kl_sweep(m.b, batch, ['2g32', '8g32'], rounding='minmax', progress=False)
    kl = {p: v for (p, f), v in m.sweep.values.items() if f.bits == 2}
    bad = [p for p, v in kl.items() if not np.isfinite(v).all()]
    if bad: raise Wrong(f'{len(bad)} of {len(kl)} units have no finite KL, such as {bad[0]}')
    dead = [p for p, v in kl.items() if v.mean() < 1e-11]
    ours = [p for p in dead if reached(m, p)]
    if ours: raise Wrong(f'{len(ours)} of {len(kl)} units changed nothing: {", ".join(kinds(ours))}')
    m.dead, left = dead, [u.path for u in m.sweep.left]
    idle = f'; without effect in the library too: {", ".join(kinds(dead))}' if dead else ''
    return f'{len(kl)} units' + idle + (f'; {len(left)} fit no group: {", ".join(kinds(left))}' if left else '')

def plan(m):
    m.plan = allocate(m.sweep, target_bpw=5)
    return f'{m.plan.nominal_bpw:.2f} bits'

def rounded(m, method: str) -> str:
    "The whole plan, rounded by a method that listens"
    tokens, dead = m.batch[:1] if m.told.get('tokens', T) > 1024 else m.batch, set(m.dead)
    heard = Statistics(m.b, tokens, False) if method == 'search' else {}
    todo = {p for p, f in m.plan.items() if not m.c.unit[p].keeps(f)}
    deaf = [p for p in heard if p in todo-dead and heard[p] is None and 'embed' not in m.c.unit[p].kind]
    if deaf: raise Wrong(f'{len(deaf)} of {len(heard)} units are not heard: {", ".join(kinds(deaf))}')
    plan, once = dict(m.plan), {m.c.unit[p].kind: p for p in reversed(sorted(todo))}
    if 'quick' in m.told and method == 'gptq':
        todo = {*once.values()}
        plan |= {p: m.c.unit[p].kept for p in plan if p not in todo}
    done = dict(round_model(m.b, tokens, plan, method))
    if lost := todo-done.keys(): raise Wrong(f'{len(lost)} of {len(todo)} units are not rounded: {", ".join(kinds(lost))}')
    off = []
    for s in samples_of(tokens) if not m.b.stacks else [tokens]:
        z = [as_numpy(m.b.logits(s, o)) for o in ({}, overrides_of(plan), as_overrides(done))]
        if not np.isfinite(z[2]).all(): raise Wrong('logits are not finite')
        off.append([np.sqrt(((y-z[0])**2).mean(-1)).ravel() for y in z[1:]])
    minmax, mine = (np.median(np.concatenate(each)) for each in zip(*off)) # in some tokens a router picks another expert
    if not todo: return 'all is kept as it is stored'
    few = ', one unit of each kind' if 'quick' in m.told and method == 'gptq' else ''
    return f'logits move by {mine/minmax:.2f} of what min-max moves them by, at the median token{few}'

def searched(m): return rounded(m, 'search')
def compensated(m): return rounded(m, 'gptq')

def save(m):
    shutil.rmtree(m.out, ignore_errors=True)
    with contextlib.redirect_stderr(io.StringIO()): convert(m.c, m.plan, m.out, m.sweep)
    if 'draft' not in m.told: return
    plan = Plan.load(m.out/'optiq'/'plan.json')
    kept = plan.solver.get('draft')
    if kept and not plan.gone: return f'the head that drafts tokens is kept in {kept["file"]} at {kept["format"]}'
    reader, why = _reader_of(m.folder), 'no loader reads the head that drafts tokens'
    if reader:
        try: reader.load(m.folder, lazy=True)
        except Exception as e: why = f'mlx-vlm does not open the head that drafts tokens ({one_line(e)})'
        else: raise Wrong('mlx-vlm opens the head that drafts tokens, and it was not kept')
    return f'{why}; the card says that {", ".join(plan.gone)} is left out'

def reload(m):
    if m.vision: model = open_plain(m.out, True)
    else:
        import mlx_lm
        model, m.tokenizer = mlx_lm.load(str(m.out))
    offs, batches = [], m.batch if m.vision else [m.batch]
    for s in batches:
        with m.b.swapped(overrides_of(m.plan)): ours = as_numpy(m.b.forward(s))
        theirs = plain_logits(model, s, m.vision)
        if m.vision: theirs = theirs[:, from_end(s)]
        if getattr(m, 'apart', 0) > CLOSE: return (
            f'transformers and mlx-lm differ in full precision already, by {m.apart:.2g} of the spread')
        if 'coarse' in m.told: # says why: an expert may flip at a rounded sum
            off = apart(theirs.reshape(-1, theirs.shape[-1]), ours.reshape(-1, ours.shape[-1]))
            if off > APART: raise Wrong(f'reloaded against ours: off by {off:.2g} at the median token')
            return f'off by {off:.1g} at the median token, since the loader {m.told["coarse"]}'
        offs.append(near(theirs, ours, 'reloaded against ours', max(CLOSE, 3*getattr(m, 'apart', 0))))
    return f'off by {max(offs):.1g}'

def cache(m):
    if m.vision: return 'not offered for models of several parts'
    try: layout = kv_layout(m.c, 64)
    except ValueError as e:
        if 'nothing of this cache can be quantized' in str(e): return str(e)
        raise
    kv_sweep(m.b, m.batch, ['4g32'], context=64, progress=False)
    model = open_plain(m.folder, False)
    config = kv_config(uniform(layout, '8g32'), layout)
    caches = mixed_caches(model, read_kv_config(config, model))
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    ids = mx.array(m.batch[:1]) # against the model's own cache, since some loaders compute another model without one
    whole, z = (as_numpy(model(ids, cache=c)) for c in (make_prompt_cache(model), caches))
    off = float(np.sqrt(((z-whole)**2).mean())/whole.std())
    if not off < .3: raise Wrong(f'with an 8-bit cache, logits are off by {off:.2g} of the spread')
    generate_with_mixed_kv(model, m.c.tokenizer, m.batch[0].tolist(), kv_config=config, max_tokens=3)
    left = sorted({l.left for l in layout.layers if l.left})
    return f'{len(layout.units)} of {2*len(layout.layers)} can be quantized' + (f' ({"; ".join(left)})' if left else '')

STEPS = dict(plain=plain, list=listed, whole=whole, tokens=tokens, replay=replay, streams=streams, gradient=gradient,
             effect=effect, plan=plan, search=searched, gptq=compensated, save=save, reload=reload, cache=cache)
NEEDS = dict(list='plain', whole='list', tokens='list', replay='list', streams='replay', gradient='opened',
             effect='opened', plan='swept', search='planned', gptq='search', save='planned', reload='save', cache='opened')
HAS = dict(opened='b', swept='sweep', planned='plan')
TORCH_STEPS = ('plain', 'list', 'replay', 'streams', 'gradient', 'effect', 'plan', 'search', 'gptq', 'save', 'reload', 'cache')

# ── one line ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def one_line(e) -> str: return f'{type(e).__name__}: '*(not isinstance(e, Wrong))+' '.join(str(e).split())[:300]

def where(e) -> str:
    "The innermost place in our code that an error passed"
    frames = [f for f in traceback.extract_tb(e.__traceback__) if '/optiq/' in f.filename]
    return f'{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}' if frames else ''

def witness(m, step: str) -> str:
    "What the library alone does in place of a step that failed; '' if it does better"
    import mlx.core as mx
    try:
        if step == 'replay' and m.backend == 'torch':
            import torch
            from transformers import AutoModelForCausalLM
            AutoModelForCausalLM.from_pretrained(m.folder, local_files_only=True)(torch.tensor(m.batch).long())
        if step == 'gradient' and m.backend == 'mlx':
            from mlx.utils import tree_map
            model = open_plain(m.folder, False)
            def total(p):
                model.update(p)
                return model(mx.array(m.batch)).astype(mx.float32).sum()
            mx.eval(mx.grad(total)(model.trainable_parameters()))
        if step == 'streams' and m.backend == 'mlx':
            model = open_plain(m.folder, False)
            rows = [plain_logits(model, m.batch[i:i+1]) for i in range(len(m.batch))]
            near(plain_logits(model, m.batch), np.concatenate(rows), 'two rows against one by one')
        if step == 'cache':
            from mlx_lm.models.cache import make_prompt_cache
            model = open_plain(m.folder, False)
            mx.eval(model(mx.array(m.batch[:1, :2]), cache=make_prompt_cache(model)))
        if step in ('save', 'reload') and not m.vision:
            from mlx_lm.convert import convert as theirs
            out = m.out.parent/'theirs'
            shutil.rmtree(out, ignore_errors=True)
            theirs(str(m.folder), str(out), quantize=True, q_group_size=32, q_bits=8)
            z = plain_logits(open_plain(out, False), m.batch)
            if not np.isfinite(z).all(): return 'its own conversion gives no finite logits'
        if step in ('save', 'reload') and m.vision:
            from mlx_vlm.utils import save_config, save_weights
            out = m.out.parent/'theirs'
            shutil.rmtree(out, ignore_errors=True)
            save_weights(out, open_plain(m.folder, True))
            save_config(m.config, out/'config.json')
            z = plain_logits(open_plain(out, True), m.batch[0], True)
            near(z, m.plain, 'what it saves and opens again, in full precision')
    except (Exception, SystemExit) as e: return one_line(e)
    return ''

def line(loader: str, family: str, backend: str, table: dict, long: bool, last: str = '', quick: bool = False,
         tell=lambda s: None) -> dict:
    "Run one family"
    row = dict(loader=loader, family=family, backend=backend)
    vision = loader == 'mlx-vlm' or bool(table.get(loader, {}).get(family, {}).get('_vision'))
    name = 'mlx-vlm' if vision else 'mlx-lm'
    entry = table[loader].get(family)
    if entry is None: return row | dict(result='no configuration yet', reason='bench/families.json has no entry')
    if '_untried' in entry: return row | dict(result='not tried', reason=entry['_untried'])
    if '_refused' in entry: return row | dict(result='refused', whose=name, step='plain', reason=entry['_refused'])
    config, told = config_of(loader, family, table)
    if long and 'long' in told: told['tokens'] = told['long']
    if quick: told['quick'] = True
    if 'set' in told: row |= dict(resized=sorted(told['set']))
    resize(told.get('set', {}))
    tmp = Path(tempfile.mkdtemp(prefix=f'{family}-'))
    m = SimpleNamespace(asked=config, told=told, vision=vision, backend=backend, form=None,
                        folder=tmp/'in'/family, out=tmp/'out'/family)
    try: found = json.dumps(row | walk(m, name, last, tell))
    finally: shutil.rmtree(tmp, ignore_errors=True)
    return json.loads(re.sub(re.escape(str(tmp))+r'/(in|out)/[^:"]*', 'the folder', found))

def walk(m, name: str, last: str = '', tell=lambda step: None) -> dict:
    "Every step that can be taken"
    steps, wrong, start = {}, [], time.perf_counter()
    for step, f in STEPS.items():
        if m.backend == 'torch' and step not in TORCH_STEPS: continue
        need = NEEDS.get(step)
        if need and (any(s == need for s, *_ in wrong) or need in HAS and not hasattr(m, HAS[need])
                     or need in STEPS and not str(steps.get(need, '')).startswith('ok')):
            steps[step] = 'not reached'
            continue
        began = time.perf_counter()
        tell(step)
        try:
            note = f(m)
            steps[step] = 'ok'+(f': {note}' if note else '')
            if step == 'plain' and m.backend == 'torch' and m.form != 'hub':
                return dict(result='refused', step='plain', steps=steps) | hub_refusal(m.hub_error)
        except (Exception, SystemExit) as e:
            steps[step] = one_line(e)
            wrong.append((step, one_line(e), where(e), '' if step == 'plain' else witness(m, step)))
            if os.environ.get('FAMILIES_TRACE'): traceback.print_exc()
            if step == 'plain' and os.environ.get('FAMILIES_TRACE'): print(m.trace)
            if step == 'plain': break
        if os.environ.get('FAMILIES_TRACE'): print(f'{step}: {time.perf_counter()-began:.1f} s', steps[step])
        if step == last: break
    about = dict(form=m.form, units=getattr(m, 'units', None), blocks=getattr(m, 'blocks', None),
                 seconds=round(time.perf_counter()-start, 1))
    return verdict(wrong, name, m) | about | dict(steps=steps)

def hub_refusal(why: 'str | None') -> dict:
    "Why there is nothing for PyTorch to open"
    if not why: return dict(whose='transformers', reason='transformers has no such class')
    if why.startswith(BUILDS): return dict(whose='transformers', reason=why)
    return dict(whose='mlx-lm', reason=f'mlx-lm does not open what transformers saves: {why}')

def verdict(wrong: list, name: str, m) -> dict:
    "Works, refused or fails; the first thing that is not the library's own counts"
    if not wrong: return dict(result='works')
    ours = [w for w in wrong if w[0] != 'plain' and not w[3]]
    step, reason, place, seen = (ours or wrong)[0]
    told = dict(step=step, reason=reason, **{'where': place} if place else {}, **{'library': seen} if seen else {})
    if not ours:
        native = m.backend == 'torch' and step == 'replay'
        return dict(result='refused', whose='transformers' if native else name, **told)
    if re.search("use --backend mlx|backend 'mlx' measures", reason): return dict(result='refused', whose='optiq', **told)
    more = [dict(step=s, reason=r, where=p) for s, r, p, _ in ours[1:]]
    return dict(result='fails', **told, **{'also': more} if more else {})

# ── all lines ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def child(args, queue):
    sys.stdout = sys.stderr = open(os.devnull, 'w') if not os.environ.get('FAMILIES_TRACE') else sys.stdout
    if os.environ.get('FAMILIES_TRACE'): faulthandler.dump_traceback_later(40)
    import torch
    torch.set_num_threads(1)
    try: queue.put(line(*args, queue.put))
    except BaseException as e:
        head = dict(zip(('loader', 'family', 'backend'), args))
        queue.put(head | dict(result='fails', step='runner', reason=one_line(e)))

def run(args, seconds: int) -> dict:
    "One line in a process of its own"
    ctx = multiprocessing.get_context('fork') # everything is imported once; MLX has computed nothing so far
    queue = ctx.Queue()
    p = ctx.Process(target=child, args=(args, queue))
    p.start()
    row, at, start = None, 'start', time.perf_counter()
    while row is None and time.perf_counter()-start < seconds:
        try: found = queue.get(timeout=1)
        except Empty:
            if not p.is_alive(): break
        else: row, at = (None, found) if isinstance(found, str) else (found, at)
    late = row is None and p.is_alive()
    p.join(2)
    if p.is_alive(): p.kill()
    if row: return row
    whose = dict(result='refused', whose=LOADER[args[0]]) if at == 'plain' else dict(result='fails')
    if late: whose = dict(result='not tried') # slow is no refusal; the step says how far it came
    why = f'not done in {seconds} seconds' if late else f'the process ended with code {p.exitcode}'
    return dict(loader=args[0], family=args[1], backend=args[2], step=at, reason=why, **whose)

def preload():
    "What every child needs, imported once"
    for name in ('torch', 'mlx.nn', 'mlx_lm.convert', 'mlx_lm.generate', 'mlx_vlm.utils', 'pandas', 'scipy.stats',
                 'safetensors.numpy', 'transformers.generation', 'transformers.models.qwen3.modeling_qwen3'):
        with contextlib.suppress(ImportError): importlib.import_module(name)
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.utils import logging
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText): kind._model_mapping.keys()
    get_checkpoint_conversion_mapping('llama') # the table of all
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    gc.freeze() # no child looks for garbage among a million objects that stay

def about(command: str) -> dict:
    names = 'mlx', 'mlx-lm', 'mlx-vlm', 'torch', 'transformers'
    git = subprocess.check_output(['git', 'rev-parse', '--short', 'HEAD'], text=True, cwd=HERE).strip()
    return machine() | {n: version(n) for n in names} | dict(command=command, commit=git, date=date.today().isoformat(),
            close=CLOSE, tokens=T)

def counts(rows: list) -> dict: # loader, backend ▸ result ▸ how many
    out = {}
    for r in rows:
        here = out.setdefault(f"{r['loader']}, {r['backend']}", {})
        key = r['result'] if r['result'] != 'refused' else f"refused by {r.get('whose')}"
        here[key] = here.get(key, 0)+1
    return out

def show(r: dict) -> str:
    reason = '' if r['result'] == 'works' else f"{r.get('step', '')}: {r.get('reason', '')}"
    return f"{r['loader']:8} {r['family']:24} {r['backend']:6} {r['result']:8} {r.get('seconds', ''):>6} {reason[:400]}"

def known_rows(out: Path) -> dict:
    rows = json.loads(out.read_text())['rows'] if out.exists() else []
    return {(r['loader'], r['family'], r['backend']): r for r in rows}

def write(out: Path, mine: dict, said: dict):
    "My rows beside those that the file has meanwhile"
    known = known_rows(out) | mine
    rows = [known[k] for k in sorted(known)]
    body = ',\n'.join('  '+json.dumps(r) for r in rows)
    head = json.dumps(dict(about=said, counts=counts(rows)), indent=1)[:-2]
    out.write_text(f'{head},\n "rows": [\n{body}\n ]\n}}\n')

def main(words=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--loader', default='mlx-lm,mlx-vlm,special')
    p.add_argument('--only', default='')
    p.add_argument('--backend', default='mlx,torch')
    p.add_argument('--seconds', type=int, default=180)
    p.add_argument('--again', action='store_true', help='also what the result file has')
    p.add_argument('--last', default='', help='go no further than this step, and write no result')
    p.add_argument('--quick', action='store_true', help='gptq rounds one unit of each kind, for the test')
    p.add_argument('--long', action='store_true', help='entries with a length of their own at that length')
    p.add_argument('-o', '--out', type=Path, default=RESULT)
    a = p.parse_args(words)
    table, known, mine, only = read_table(), known_rows(a.out), {}, {a.only, *a.only.split(',')}-{''} # a name may hold a comma
    preload()
    said = about('python bench/families.py')
    dated = {k: said[k] for k in ('commit', 'date')}
    for loader in a.loader.split(','):
        files = [] if loader == 'special' else model_files(loader)
        for family in sorted({*files, *table[loader]}):
            if only and family not in only: continue
            for backend in a.backend.split(','):
                key = loader, family, backend
                said_here = table[loader].get(family, {})
                if backend == 'torch' and (loader == 'mlx-vlm' or {'_vision', '_draft'} & {*said_here}): continue
                if key in known and not (a.again or only or a.last): continue
                mine[key] = run((loader, family, backend, table, a.long, a.last, a.quick), a.seconds) | dated
                print(show(mine[key]), flush=True)
                if not a.last: write(a.out, mine, said)
    print(json.dumps(counts(list((known | mine).values())), indent=1))

if __name__ == '__main__': main()
