"What a loader leaves out of a checkpoint is named in the sweep, the plan and the model card"
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from optiq.convert import convert
from optiq.knapsack import allocate
from optiq.material.tiny import tiny
from optiq.models import Checkpoint
from optiq.plan import Plan
from optiq.sensitivity import kl_sweep

def test_the_draft_head_of_qwen3_5(tmp_path):
    c = Checkpoint(tiny('qwen3_5', tmp_path/'m', dtype='float32'), model_type='llm')
    assert {*c.left_out} == {'mtp', 'model.visual'} and c.left_out['mtp'] > 1000
    tokens = np.random.default_rng(0).integers(0, c.vocabulary, (1, 16)).astype(np.int32)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        sweep = kl_sweep(c, tokens, ['4g32', '8g32'], rounding='minmax', method='gradient', progress=False)
    p = allocate(sweep, target_bpw=6)
    assert p.made['left_out'] == c.left_out and 'without' in repr(p) and 'mtp' in repr(p)
    p.save(tmp_path/'plan.json')
    assert Plan.load(tmp_path/'plan.json').made == p.made
    saved = convert(c, p, tmp_path/'out', sweep)
    card = (saved.folder/'README.md').read_text()
    assert f"mtp ({c.left_out['mtp']:,} parameters)" in card and 'this model is without' in card

@pytest.mark.parametrize('architecture', ['llama', 'qwen3_moe', 'gemma3'])
def test_whatever_is_renamed_or_stacked_is_not_left_out(tmp_path, architecture):
    assert Checkpoint(tiny(architecture, tmp_path/'m'), model_type='llm').left_out.keys() <= {'model.vision_tower', 'vision_tower',
        'multi_modal_projector', 'model.multi_modal_projector'}

def test_blocks_behind_the_last_are_a_part_of_their_own(tmp_path):
    folder = tiny('qwen3_moe', tmp_path/'m', dtype='float32')
    c = Checkpoint(folder)
    n, tensors = c.n_blocks, load_file(folder/'model.safetensors')
    more = {k.replace('layers.0.', f'layers.{n}.'): v for k, v in tensors.items() if 'layers.0.' in k}
    save_file(tensors | more, folder/'model.safetensors', {'format': 'pt'})
    try: found = Checkpoint(folder).left_out
    except ValueError: return # the loader refuses it
    assert [*found] == [f'model.layers.{n}'] and found[f'model.layers.{n}'] == sum(v.size for v in more.values())

ROUTERS = {'mlp.gate': True, 'mlp.gate.gate_proj': True, 'mlp.gate.wg': True, 'mlp.router.classifier': True, 'mlp.scores': True,
           'mlp.shared_expert.gate_proj': False, 'mlp.shared_expert.down_proj': False, 'self_attn.q_proj': False, 'mlp.wide': False}

@pytest.mark.parametrize('name', ROUTERS)
def test_routers_are_told_by_what_they_do(name):
    from optiq.units import _routes
    here = 'model.layers.3.'
    layers = {here+n: None for n in (*ROUTERS, 'mlp.shared_expert.up_proj', 'mlp.switch_mlp.up_proj')}
    experts = {here+'mlp.switch_mlp.up_proj': 8, 'model.layers.4.mlp.switch_mlp.up_proj': 8}
    assert _routes(here+name, (16 if name == 'mlp.wide' else 8, 64), experts, layers) == ROUTERS[name]
