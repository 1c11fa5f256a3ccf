"One family for each kind of structure, down the whole road; all of them are in `bench/families.py`"
import json, os, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).parents[1]
KINDS = dict(
    llama='a chain', gpt2='blocks in a list of another name', gpt_neox='a head that is called embed_out',
    internlm2='a head that is called output',
    gemma4_text='blocks that answer with keys and values', hunyuan='keys that the next block shares', rwkv7='states of another kind beside',
    nanbeige='blocks that run twice', iquestloopcoder='blocks that are never called',
    olmo_hybrid='a model that asks for the class of its blocks',
    longcat_flash_ngram='projections outside the blocks', qwen3_moe='experts', mamba2='state spaces',
    deepseek_v32='latent attention and an indexer',
    gpt_oss='attention sinks', qwen3_5='linear attention')

@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp('families')/'rows.json'
    run = [sys.executable, 'bench/families.py', '--loader', 'mlx-lm', '--backend', 'mlx', '--only', ','.join(KINDS), '-o', str(out)]
    done = subprocess.run(run, cwd=root, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-2000:]
    return {r['family']: r for r in json.loads(out.read_text())['rows']}

@pytest.mark.parametrize('family', KINDS)
def test_works(family, rows): assert rows[family]['result'] == 'works', rows[family]
