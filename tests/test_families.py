"One family for each kind of structure, down the whole road; all of them are in `bench/families.py`"
import json, os
from pathlib import Path
import numpy as np
import pytest
import apart

root = Path(__file__).parents[1]
KINDS = dict(
    llama='a chain', gpt2='blocks in a list of another name', gpt_neox='a head that is called embed_out',
    internlm2='a head that is called output',
    gemma4_text='blocks that answer with keys and values', hunyuan='keys that the next block shares', rwkv7='states of another kind beside',
    nanbeige='blocks that run twice', iquestloopcoder='blocks that are never called',
    olmo_hybrid='a model that asks for the class of its blocks',
    longcat_flash_ngram='projections outside the blocks', qwen3_moe='experts', mamba2='state spaces',
    deepseek_v32='latent attention and an indexer',
    gpt_oss='attention sinks', qwen3_5='linear attention', kimi_k3='a weight that is derived at first use',
    gemma3n='streams stacked on the first axis')
SPECIAL = ('gpt-oss in MXFP4 as its maker stores it', 'Gemma 4 E type', 'Qwen3.5 with a draft head', 'DeepSeek V3.2 with its indexer awake',
           'Hunyuan 4 as text of mlx-vlm')

TORCH = ('gpt-oss in MXFP4 as its maker stores it', 'Gemma 4 E type', 'DeepSeek V3.2 with its indexer awake')
RUNS = dict(mlx=[*KINDS, *SPECIAL], torch=TORCH)

BENCH = '''
import json, sys
sys.path.insert(0, 'bench')
import families
for backend, names in json.loads(sys.argv[2]).items():
    asked = f'--loader mlx-lm,special --backend {backend} --quick -o {sys.argv[1]}'.split()
    families.main([*asked, '--only', ','.join(names)])
'''

@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    "All in one process, which imports everything once and forks one for each"
    out = tmp_path_factory.mktemp('families')/'rows.json'
    done = apart.run('-c', BENCH, out, json.dumps(RUNS), cwd=root, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-2000:]
    return {(r['backend'], r['family']): r for r in json.loads(out.read_text())['rows']}

@pytest.mark.parametrize('backend, family', [(b, f) for b, names in RUNS.items() for f in names])
def test_works(backend, family, rows): assert rows[backend, family]['result'] == 'works', rows[backend, family]

def test_no_entry_stands_twice():
    "Of two entries of one name the last counts, and the other is edited in vain"
    def once(pairs):
        names = [k for k, _ in pairs]
        assert len({*names}) == len(names), sorted(k for k in {*names} if names.count(k) > 1)
        return dict(pairs)
    json.loads((root/'bench'/'families.json').read_text(), object_pairs_hook=once)
    rows = json.loads((root/'nbs'/'results'/'families.json').read_text())['rows']
    assert len({(r['loader'], r['family'], r['backend']) for r in rows}) == len(rows)

def written(tmp_path, monkeypatch, family, vision, **changes):
    "A special form as a folder"
    monkeypatch.syspath_prepend(root/'bench')
    import families
    config, told = families.config_of('special', family, families.read_table())
    families.write_checkpoint(tmp_path/'m', config | changes, told, 'mlx', vision)
    return tmp_path/'m'

def test_text_that_only_mlx_vlm_opens_is_measured_on_text(tmp_path, monkeypatch):
    from optiq.convert import convert
    from optiq.knapsack import allocate
    from optiq.measure.sweep import texts_for
    from optiq.models import Checkpoint
    from optiq.sensitivity import kl_sweep
    c = Checkpoint(written(tmp_path, monkeypatch, 'Hunyuan 4 as text of mlx-vlm', True, num_hidden_layers=2))
    assert c.model_type == 'vlm' and c.text_only
    tokens = texts_for(c, 'bundled', 2, 24, 0)[0]
    assert tokens.shape == (2, 24)
    sweep = kl_sweep(c, tokens, ['2g32', '8g32'], rounding='minmax', progress=False)
    assert convert(c, allocate(sweep, target_bpw=5), tmp_path/'out', sweep).text_only

def test_indexers_wake_beyond_what_they_pick(tmp_path, monkeypatch):
    "DeepSeek V3.2 attends to 2,048 tokens: its indexer does nothing in a sequence so long, and something in one of 4,096"
    from optiq.backends.open import open_backend
    from optiq.evals.perplexity import overrides_of
    from optiq.formats import parse_format
    small = dict(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, index_n_heads=1, head_dim=32)
    b = open_backend(str(written(tmp_path, monkeypatch, 'DeepSeek V3.2 at 4,096 tokens', False, **small)), 'mlx')
    change = overrides_of({u.path: parse_format('2g32') for u in b.checkpoint.units if 'indexer' in u.path and u.block == 0})
    ids = np.random.default_rng(0).integers(11, 500, (1, 4096)).astype(np.int32)
    plain, changed = b.numpy(b.logits(ids))[0], b.numpy(b.logits(ids, change))[0]
    assert change and (plain[:2048] == changed[:2048]).all() and (plain[2048:] != changed[2048:]).any()

def test_experts_in_one_tensor_hear_their_own_tokens(tmp_path, monkeypatch):
    "DBRX: transformers keeps all experts as the rows of one matrix, mlx-lm each by itself; both hear the same tokens"
    monkeypatch.syspath_prepend(root/'bench')
    import families
    from optiq.backends.open import open_backend
    from optiq.models import Checkpoint
    from optiq.statistics import Statistics
    config, told = families.config_of('mlx-lm', 'dbrx', families.read_table())
    families.write_checkpoint(tmp_path/'m', config, told, 'hub', False)
    ids = np.random.default_rng(0).integers(11, 500, (2, 24)).astype(np.int32)
    here = Checkpoint(tmp_path/'m')
    torch, mlx = ({p: s and s.count for p, s in Statistics(open_backend(here, b), ids, False).items()} for b in ('torch', 'mlx'))
    experts = [p for p in here.unit if 'experts' in p]
    assert torch == mlx and len({torch[p] for p in experts}) > 1 and all(torch[p] < ids.size for p in experts)
