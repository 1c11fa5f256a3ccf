"""What a whole conversion holds in memory and reads from disk when a model is streamed, stage by stage.

    python bench/memory.py --shape small --max-memory 1 -o memory.json
    python bench/memory.py --shape 8B --max-memory 12 --layers 36 -o memory.json
    python bench/memory.py --shape 30B-A3B --max-memory 16 --layers 12 -o memory.json

Weights are random: memory, bytes and times are those of the shape, and nothing here says how good a model is.
A thread looks at the memory of the process every 5 ms, and at what MLX holds on a GPU; of the resident pages it counts those of the
process's own (RssAnon) and those of mapped files, libraries most of all, apart. `read` counts the bytes that were asked of files, `disk`
those that the system had to fetch: run it in a control group whose memory is limited, or everything is still in the page cache.
"""
import argparse
import json
import os
import sys
import threading
import time
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

SHAPES = {
    'small': ('qwen3', dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=36, max_window_layers=36, num_attention_heads=8,
                            num_key_value_heads=2, head_dim=128, vocab_size=37984, tie_word_embeddings=False)), # a quarter of the 8B shape in all widths
    '8B/16': ('qwen3', dict(hidden_size=256, intermediate_size=768, num_hidden_layers=36, max_window_layers=36, num_attention_heads=4,
                            num_key_value_heads=1, head_dim=64, vocab_size=9496, tie_word_embeddings=False)), # and a sixteenth
    '8B': ('qwen3', '8B'),
    '30B-A3B/16': ('qwen3_moe', dict(hidden_size=128, intermediate_size=384, moe_intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
                                     num_key_value_heads=2, head_dim=32, num_experts=16, num_experts_per_tok=4, norm_topk_prob=True, vocab_size=2048,
                                     tie_word_embeddings=False, decoder_sparse_step=1, mlp_only_layers=[])), # to try the next one on a CPU
    '30B-A3B': ('qwen3_moe', dict(hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32,
                                  num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
                                  vocab_size=151936, max_position_embeddings=40960, rope_theta=1e6, tie_word_embeddings=False,
                                  decoder_sparse_step=1, mlp_only_layers=[]))}

def checkpoint(shape, layers, folder):
    "A folder of random weights: the bytes of one block again and again, since making them takes longest"
    import numpy as np
    from optiq.material.tiny import _generation, _hub_tensors, _shard_header, _write, _write_tokenizer, hub_config
    architecture, changes = SHAPES[shape]
    config = hub_config(architecture, changes)
    if layers: config |= dict(num_hidden_layers=layers) | (dict(max_window_layers=layers) if 'max_window_layers' in config else {})
    out = Path(folder)
    if (out/'config.json').exists(): return out
    out.mkdir(parents=True, exist_ok=True)
    shapes, rng, files = _hub_tensors(config), np.random.default_rng(0), {}
    noise = ((rng.standard_normal(2**22, np.float32)*.02).view(np.uint32) >> 16).astype(np.uint16) # bfloat16
    for name, s in shapes.items(): files.setdefault(name.split('.')[2] if '.layers.' in name else 'ends', {})[name] = s
    index = {}
    for k, (part, tensors) in enumerate(files.items()):
        file = out/f'model-{k+1:05d}-of-{len(files):05d}.safetensors'
        with open(file, 'wb') as f:
            f.write(_shard_header(tensors, 'bfloat16'))
            for name, s in tensors.items():
                n, start = int(np.prod(s)), int(rng.integers(2**20))
                if 'norm' in name: f.write(np.full(n, 0x3f80, np.uint16).tobytes())
                else: # never the same stretch twice in a row
                    while n > 0:
                        part = noise[start:start+n]
                        f.write(part.tobytes())
                        n, start = n-len(part), int(rng.integers(2**20))
        index |= dict.fromkeys(tensors, file.name)
    _write(out/'model.safetensors.index.json', dict(metadata={}, weight_map=index))
    _write(out/'generation_config.json', _generation(config))
    _write_tokenizer(out)
    _write(out/'config.json', config)
    return out

class Watch:
    "Peaks of memory and bytes read, by stage"
    def __init__(self):
        import mlx.core as mx
        self.mx, self.stage, self.rows, self.on, self.part, self.begin = mx, ['start'], {}, True, None, time.perf_counter()
        self.gpu = mx.default_device().type == mx.DeviceType.gpu
        self.last, self.clock = self.read(), time.perf_counter()
        threading.Thread(target=self.look, daemon=True).start()

    def read(self):
        io = dict(line.split(': ') for line in open('/proc/self/io'))
        return int(io['rchar']), int(io['read_bytes'])
    def memory(self):
        said = dict(line.split(':') for line in open('/proc/self/status') if line.startswith('Rss'))
        pages = 1024*int(said['RssAnon'].split()[0])
        self.row()['mapped'] = max(self.row().get('mapped', 0), 1024*int(said['RssFile'].split()[0]))
        return pages, (self.mx.get_active_memory()+self.mx.get_cache_memory()) if self.gpu else 0, self.mx.get_active_memory()
    def look(self):
        while self.on:
            m = self.memory()
            row = self.row()
            for k, v in zip(('rss', 'gpu', 'active'), m): row[k] = max(row[k], v)
            row['both'] = max(row['both'], m[0]+m[1])
            time.sleep(.005)
    def save(self, file, size, about):
        file.write_text(json.dumps(about | dict(model_bytes=size, stages=self.rows, read_in_all=sum(r['read'] for r in self.rows.values())/size, disk_in_all=sum(r['disk'] for r in self.rows.values())/size), indent=1)+'\n')
    def row(self): return self.rows.setdefault(self.stage[-1], dict(rss=0, gpu=0, active=0, both=0, peak=0, read=0, disk=0, seconds=0.))
    def close(self):
        now, t, row = self.read(), time.perf_counter(), self.row()
        row['read'] += now[0]-self.last[0]
        row['disk'] += now[1]-self.last[1]
        row['peak'] = max(row['peak'], self.mx.get_peak_memory()) # of MLX, between two changes of stage
        self.mx.reset_peak_memory()
        row['seconds'] += t-self.clock
        self.last, self.clock = now, t
    @contextmanager
    def at(self, stage):
        self.close()
        self.stage.append(stage)
        self.row()['held'] = self.mx.get_active_memory() # when it begins
        try: yield
        finally:
            self.close()
            self.stage.pop()
            if self.part is not None: self.save(*self.part)
    def watched(self, owner, name, stage):
        f = getattr(owner, name)
        @wraps(f)
        def run(*a, **k):
            with self.at(stage):
                print(f'[{time.perf_counter()-self.begin:6.1f} s] {stage}', flush=True)
                return f(*a, **k)
        setattr(owner, name, run)

def as_on_a_gpu(part):
    "A scale model: what is sized by a GPU is sized so here, and what has a fixed size is a part of it"
    from optiq import grid
    from optiq.backends.mlx import MLXBackend
    from optiq.backends.stream import StreamingBackend
    MLXBackend.on_gpu, StreamingBackend.rows, whole = True, StreamingBackend.rows//int(part**.5), grid._in_parts
    grid._in_parts = lambda w, n=2**26: whole(w, n//part)

def main(args):
    from optiq import job, pipeline
    c = sys.modules['optiq.convert']
    if args.part > 1: as_on_a_gpu(args.part)
    folder = checkpoint(args.shape, args.layers, args.folder)
    if args.make_only: return
    size = sum(f.stat().st_size for f in folder.glob('*.safetensors'))
    w = Watch()
    w.part = Path(f'{args.o}.part'), size, dict(shape=args.shape, layers=args.layers)
    for owner, name, stage in ((pipeline, '_find_sweep', 'sweep'), (pipeline, '_choose', 'verify'), (pipeline, 'round_to_files', 'round'), (c, '_write', 'pack'),
                               (c, 'check_saved', 'check'), (pipeline, '_scores', 'score'), (pipeline, '_expected', 'estimate'), (pipeline._Task, 'choose', 'estimate'), (pipeline, '_time_rounding', 'estimate'),
                               (job, 'open_backend', 'open'), (pipeline, 'as_saved', 'score')):
        w.watched(owner, name, stage)
    start, before, announce, expected = time.perf_counter(), w.memory(), pipeline._announce_road, {}
    def said(steps):
        expected.update(steps)
        announce(steps)
    pipeline._announce_road = said
    found = pipeline.optimize(str(folder), f'{args.folder}-out', pipeline.Caps(target_bpw=args.target), weights=pipeline.Weights(formats=args.formats, rounding=args.rounding,
        compare=not args.skip_baselines, **(dict(method=args.method) if args.method else {})), texts=pipeline.Texts(n_calibration=args.n, seq_len=args.seq_len, n_evaluation=args.n_evaluation, eval_len=args.eval_len),
        backend=args.backend, overwrite=True, **({args.option: args.max_memory*2**30} if args.max_memory else {}))
    seconds = time.perf_counter()-start
    w.close()
    w.on = False
    out = dict(shape=args.shape, layers=args.layers, model_bytes=size, max_memory=args.max_memory, backend=args.backend, before=before, seconds=seconds,
               stages=w.rows, read_in_all=sum(r['read'] for r in w.rows.values())/size, disk_in_all=sum(r['disk'] for r in w.rows.values())/size, peak=max(r['both'] for r in w.rows.values())/2**30,
               kl=found['figures']['kl'], expected=expected, formats=args.formats, tokens=[args.n, args.seq_len], rounding=args.rounding)
    for k, r in w.rows.items(): print(f"{k:10} {r['seconds']:7.1f} s  rss {r['rss']/2**30:6.2f} GB  gpu {r['gpu']/2**30:6.2f}  peak in MLX {r['peak']/2**30:6.3f} (held {r.get('held', 0)/2**30:6.3f})  both {r['both']/2**30:6.2f}  read {r['read']/size:5.2f}, from disk {r['disk']/size:5.2f} × the model")
    print(f"peak {out['peak']:.2f} GB of {args.max_memory}, model {size/2**30:.2f} GB, {out['read_in_all']:.2f} × read, {out['disk_in_all']:.2f} × from disk, {seconds:.0f} s", flush=True)
    from optiq.report import machine
    out['about'] = machine() | dict(command=' '.join(['python', *sys.argv]))
    all_ = json.loads(Path(args.o).read_text()) if Path(args.o).exists() else {}
    Path(args.o).write_text(json.dumps(all_ | {f'{args.shape} {args.name}'.strip(): out}, indent=1)+'\n')

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--shape', default='small', choices=SHAPES)
    p.add_argument('--layers', type=int, help='another number of blocks')
    p.add_argument('--folder', default='/tmp/random-model')
    p.add_argument('--max-memory', type=float)
    p.add_argument('--option', default='states_memory')
    p.add_argument('--backend', default='stream')
    p.add_argument('--method')
    p.add_argument('--rounding')
    p.add_argument('--formats', type=lambda s: [int(x) for x in s.split(',')], default=[4, 8])
    p.add_argument('--target', type=float, default=4.5)
    p.add_argument('--n', type=int, default=2)
    p.add_argument('--seq-len', type=int, default=32)
    p.add_argument('--n-evaluation', type=int, default=2)
    p.add_argument('--eval-len', type=int, default=256)
    p.add_argument('--skip-baselines', action='store_true')
    p.add_argument('--fast-blas', action='store_true', help="on a CPU: PyTorch's products in MLX")
    p.add_argument('--part', type=int, default=1, help='of the real size in bytes, for a scale model on a CPU: 256 for 8B/16')
    p.add_argument('--make-only', action='store_true')
    p.add_argument('--name', default='')
    p.add_argument('-o', default='memory.json')
    args = p.parse_args()
    if args.fast_blas: # before MLX
        import ctypes
        from importlib.util import find_spec
        ctypes.CDLL(str(Path(find_spec('torch').origin).parent/'lib'/'libtorch_cpu.so'), mode=ctypes.RTLD_GLOBAL)
    main(args)
