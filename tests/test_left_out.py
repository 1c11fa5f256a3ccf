"What a loader leaves out of a checkpoint is named in the sweep, the plan and the model card"
import json
import warnings

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from optiq.convert import convert
from optiq.knapsack import allocate
from optiq.material.tiny import tiny
from optiq.models import Checkpoint
from optiq.plan import Plan, uniform
from optiq.sensitivity import kl_sweep

@pytest.fixture(scope='module')
def drafting(tmp_path_factory):
    "Qwen3.5 with a head that drafts tokens, and a sweep of it"
    c = Checkpoint(tiny('qwen3_5', tmp_path_factory.mktemp('qwen')/'m', dtype='float32'), model_type='llm')
    tokens = np.random.default_rng(0).integers(0, c.vocabulary, (1, 16)).astype(np.int32)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return c, kl_sweep(c, tokens, ['4g32', '8g32'], rounding='minmax', method='gradient', progress=False)

def test_the_draft_head_of_qwen3_5_is_named(tmp_path, drafting):
    c, sweep = drafting
    assert {*c.left_out} == {'mtp', 'model.visual'} and c.left_out['mtp'] > 1000
    p = allocate(sweep, target_bpw=6)
    assert p.made['left_out'] == c.left_out and 'without' in repr(p) and 'mtp' in repr(p)
    p.save(tmp_path/'plan.json')
    assert Plan.load(tmp_path/'plan.json').made == p.made

@pytest.mark.parametrize('fmt, bits', {'8g64': 8, '6g32': 6, 'as-is': None}.items())
def test_the_draft_head_of_qwen3_5_is_kept(tmp_path, drafting, fmt, bits):
    "By default at 8 bits: mlx-vlm finds it in the folder, mlx-lm opens the same model as without it"
    from mlx_vlm.speculative.drafters import load_drafter
    from mlx_lm.utils import load_model
    c, sweep = drafting
    p = allocate(sweep, target_bpw=6)
    saved = convert(c, p, tmp_path/'out', sweep, **{} if fmt == '8g64' else dict(draft=fmt))
    head, kind = load_drafter(str(saved.folder))
    whole = load_drafter(str(c.folder))[0]
    assert kind == 'mtp' and getattr(head.fc, 'bits', None) == bits
    plain = head.fc.weight if bits is None else mx.dequantize(
        head.fc.weight, head.fc.scales, head.fc.biases, head.fc.group_size, bits)
    off = float(abs(plain-whole.fc.weight).max()/abs(whole.fc.weight).max())
    assert off == 0 if bits is None else 0 < off < 2/2**bits
    assert mx.array_equal(head.norm.weight, whole.norm.weight)
    said = Plan.load(saved.folder/'optiq'/'plan.json')
    assert said.solver['draft']['format'] == fmt and {*said.gone} == {'model.visual'} and 'drafts' in repr(said)
    card = (saved.folder/'README.md').read_text()
    assert f'`mtp.safetensors` at {fmt}' in card and 'leaves out model.visual' in card
    ids = mx.array([[5, 9, 200, 31]])
    before = load_model(saved.folder)[0](ids)
    (saved.folder/'mtp.safetensors').unlink()
    assert mx.array_equal(before, load_model(saved.folder)[0](ids))

def test_a_draft_head_drafts(tmp_path, drafting):
    "What mlx-vlm generates with the kept head is what it generates without: a draft is checked before it is taken"
    from mlx_vlm import generate, load
    from mlx_vlm.speculative.drafters import load_drafter
    c, sweep = drafting
    vlm = Checkpoint(c.folder)
    saved = convert(vlm, uniform(vlm, '8g32'), tmp_path/'out')
    assert vlm.left_out == {'mtp': c.left_out['mtp']} and (saved.folder/'mtp.safetensors').exists()
    (model, processor), (head, kind) = load(str(saved.folder)), load_drafter(str(saved.folder))
    said = [generate(model, processor, 'Three sailors carried', max_tokens=12, temperature=0., **more).text
            for more in ({}, dict(draft_model=head, draft_kind=kind))]
    assert said[0] == said[1] and head.draft_lens

def test_a_draft_head_that_mlx_vlm_does_not_read_again_is_left_out(tmp_path, drafting, monkeypatch, capsys):
    import optiq.draft
    c, sweep = drafting
    def other(head, arrays): raise ValueError('no head of mine')
    monkeypatch.setattr(optiq.draft, '_check_head', other)
    p = allocate(sweep, target_bpw=6)
    saved = convert(c, p, tmp_path/'out', sweep)
    assert 'left out: no head of mine' in capsys.readouterr().err and not {'mtp.safetensors', 'draft'} & {f.name for f in saved.folder.iterdir()}
    assert f"mtp ({c.left_out['mtp']:,} parameters)" in (saved.folder/'README.md').read_text()
    assert not any(k.startswith('mtp') for k in json.loads((saved.folder/'config.json').read_text())['quantization'])

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

@pytest.mark.parametrize('family, form, file, part', [('GLM 5 with a draft head', 'mlx', 'draft/model.safetensors', 'model.layers.2'),
    ('Qwen3-Next with a draft head', 'hub', 'mtp.safetensors', 'mtp'), ('DeepSeek V3 with a draft head', 'mlx', None, 'model.layers.61')])
def test_draft_heads_of_other_families(tmp_path, monkeypatch, family, form, file, part):
    "Kept where mlx-vlm opens them, under whatever names; said to be left out where no loader reads them"
    from pathlib import Path
    from mlx_vlm.speculative.drafters import load_drafter
    monkeypatch.syspath_prepend(Path(__file__).parents[1]/'bench')
    import families
    config, told = families.config_of('special', family, families.read_table())
    families.write_checkpoint(tmp_path/'m', config, told, form, False)
    c = Checkpoint(tmp_path/'m', model_type='llm')
    assert [*c.left_out] == [part]
    saved = convert(c, uniform(c, '8g32'), tmp_path/'out')
    plan, card = Plan.load(saved.folder/'optiq'/'plan.json'), (saved.folder/'README.md').read_text()
    if file is None:
        assert [*plan.gone] == [part] and 'draft' not in plan.solver and f'leaves out {part}' in card
        return
    assert not plan.gone and plan.solver['draft']['file'] == file and (saved.folder/file).exists() and f'`{file}` at 8g64' in card
    head, kind = load_drafter(str((saved.folder/file).parent))
    assert kind == 'mtp' and {8} == {m.bits for m in head.modules() if hasattr(m, 'bits')}

def test_a_draft_head_beside_the_model_is_kept_under_any_file_name(tmp_path, monkeypatch):
    "mlx-vlm finds it there, and all that stands in the model's own files has a place in the model"
    from pathlib import Path
    monkeypatch.syspath_prepend(Path(__file__).parents[1]/'bench')
    import families
    config, told = families.config_of('special', 'GLM 5 with a draft head', families.read_table())
    families.write_checkpoint(tmp_path/'m', config, told, 'mlx', False)
    whole = mx.load(str(file := tmp_path/'m'/'model.safetensors'))
    mx.eval(whole)
    drafts = {k: v for k, v in whole.items() if k.startswith('model.layers.2.')}
    mx.save_safetensors(str(file), {k: v for k, v in whole.items() if k not in drafts}, {'format': 'mlx'})
    assert Checkpoint(tmp_path/'m', model_type='llm').knows_all
    mx.save_safetensors(str(file.with_name('head.safetensors')), drafts, {'format': 'mlx'})
    c = Checkpoint(tmp_path/'m', model_type='llm')
    saved = convert(c, uniform(c, '8g32'), tmp_path/'out')
    assert Plan.load(saved.folder/'optiq'/'plan.json').solver['draft']['file'] == 'draft/model.safetensors'
