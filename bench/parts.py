"""Models of several parts at their real shapes, on random weights: units, sizes, and the memory of the streaming replay.

    python bench/parts.py [--only sizes,memory] -o results.json

`sizes`   units of Qwen3-VL-2B by part and by kind of layer; bytes of a uniform plan by arithmetic, and as mlx-vlm saves it
`memory`  resident memory of one probe with one block at a time, in a process of its own

Random weights say nothing about quality, and no quality is measured here.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path


from optiq.report import machine
from optiq.plan import default_of_vlm, uniform
from optiq.folder import read_header
from optiq.models import Checkpoint
from optiq.material.tiny import tiny

def sizes(folder: Path) -> dict:
    c = Checkpoint(folder)
    plan, default = uniform(c, '4g64'), default_of_vlm(c)
    with tempfile.TemporaryDirectory() as d:
        from mlx_vlm.convert import convert
        convert(str(folder), f'{d}/m', quantize=True, q_group_size=64, q_bits=4, quant_predicate=lambda path, module: True)
        saved = tensor_bytes(Path(d)/'m')
    linear = sum('embed' not in u.kind for u in c.units)
    return dict(model='Qwen3-VL-2B shape, random', parameters=c.params, linear_layers=linear,
                head='tied to the embedding; as a layer of its own it is one more', units=dict(Counter(u.part for u in c.units)),
                uniform_4g64_bytes=plan.nbytes, mlx_vlm_everywhere_bytes=saved, default_bytes=default.nbytes,
                bf16_bytes=c.other_bytes+sum(2*u.params for u in c.units))

def tensor_bytes(folder: Path) -> int:
    return sum(t['data_offsets'][1]-t['data_offsets'][0] for f in folder.glob('model*.safetensors') for t in read_header(f).values())

PROBE = '''
import sys, time, resource, json, numpy as np, mlx.core as mx
from optiq.backends.stream import StreamedReplay
from optiq.formats import Format, quantize_dequantize
from optiq.models import Checkpoint
class Backend(StreamedReplay):
    def __init__(self, checkpoint): # weights are random: they need no check, which would read them all
        self.xp, self.checkpoint, self.n_blocks, self.dtype = mx, checkpoint, checkpoint.n_blocks, mx.float32
        self.model = self.open()
mx.set_cache_limit(0)
b, start = Backend(Checkpoint(sys.argv[1])), time.perf_counter()
ids = [[151652, *[151655]*16, 151653, *range(40, 60)]]
sample = dict(input_ids=np.array(ids), image_grid_thw=np.array([[1, 8, 8]]), pixel_values=np.random.default_rng(0).standard_normal((64, 1536)),
              scored=np.eye(len(ids[0]))[None, -4:].sum(1))
passed, z = b.record(sample)
mx.eval(z)
forward, start = time.perf_counter()-start, time.perf_counter()
u = next(u for u in b.checkpoint.units if u.block == 40)
mx.eval(b.head(passed.at(40), {u.path: lambda w: quantize_dequantize(w, Format(4, 64))}))
print(json.dumps(dict(forward_seconds=forward, probe_in_block_40_seconds=time.perf_counter()-start, mlx_peak_bytes=mx.get_peak_memory(),
                      peak_resident_bytes=1024*resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)))
'''

def memory(folder: Path) -> dict:
    done = subprocess.run([sys.executable, '-c', PROBE, str(folder)], check=True, capture_output=True, text=True)
    c = Checkpoint(folder)
    whole, block = 4*c.params, 4*max(sum(u.params for u in c.units if u.block == i) for i in range(c.n_blocks))
    outside = 4*sum(u.params for u in c.units if u.block is None)
    return json.loads(done.stdout) | dict(whole_in_float32=whole, largest_block_in_float32=block, outside_the_blocks_in_float32=outside)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='sizes,memory')
    parser.add_argument('-o', '--output', required=True)
    args, out = parser.parse_args(), {}
    ids = dict(image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653)
    with tempfile.TemporaryDirectory() as d:
        from optiq.material.configs import _SHAPES, _merged
        folder = tiny('qwen3_vl', f'{d}/model', shape=_merged(_SHAPES['qwen3_vl']['2B'], ids))
        for name in args.only.split(','):
            out[name] = dict(sizes=sizes, memory=memory)[name](folder)
            about = dict(command='python bench/parts.py '+' '.join(sys.argv[1:]), **machine())
            Path(args.output).write_text(json.dumps(dict(about=about, **out), indent=1)+'\n')
            print(name, out[name], flush=True)
