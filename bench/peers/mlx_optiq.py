"""mlx-optiq's own sweep, allocation and conversion on given tokens; run with its environment first on PYTHONPATH, ours not on it.

    PYTHONPATH=FOLDER_OF_ITS_WHEELS python3 bench/peers/mlx_optiq.py MODEL TOKENS.json OUT 5:4,8 4.5:4,5 …

Each plan is its target (`--target-bpw`) and its candidate bits (`--candidate-bits`); what it writes is OUT/TARGET-BITS, for `ours.py --optiq OUT`.
"""
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

model, tokens, out, *plans = sys.argv[1:]
out, plans = Path(out), [(float(t), [int(b) for b in bits.split(',')]) for t, bits in (p.split(':') for p in plans)]

mx.set_cache_limit(2**33) # another process may need the memory

from mlx_lm.utils import load_model
from optiq.backends.mlx_backend import convert_llm_to_mlx
from optiq.core.optimizer import make_quant_predicate, optimize_mixed_precision
from optiq.core.sensitivity import analyze_sensitivity_exact

batch = [((mx.array(t)[None],), {}) for t in json.loads(Path(tokens).read_text())]
start = time.perf_counter()
found = analyze_sensitivity_exact(load_model(Path(model))[0], lambda: batch, candidate_bits=sorted({b for _, bits in plans for b in bits}),
                                  n_calibration=len(batch))
swept = time.perf_counter()-start
for target, bits in plans:
    folder, start = out/f'{target:g}-{",".join(map(str, bits))}', time.perf_counter()
    plan = optimize_mixed_precision(found, target_bpw=target, candidate_bits=bits, group_size=64)
    convert_llm_to_mlx(model, str(folder), quant_predicate=make_quant_predicate(plan), q_bits=4, q_group_size=64)
    (folder/'peer.json').write_text(json.dumps(dict(seconds=time.perf_counter()-start, sweep_seconds=swept, reported_bits=plan.achieved_bpw,
        versions={p: version(p) for p in ('mlx-optiq', 'mlx-lm', 'mlx')})))
    print(folder, plan.achieved_bpw, flush=True)
