"A model that is stored in few bits is measured against what its codes stand for, and keeps them where they are chosen"
import json
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gpt_oss
from mlx_lm.utils import load_model
from safetensors.numpy import load_file, save_file

from optiq.backends.open import open_backend
from optiq.convert import convert
from optiq.formats import Format, parse_format
from optiq.knapsack import allocate
from optiq.material.tiny import _write_tokenizer, tiny
from optiq.models import Checkpoint
from optiq.plan import Plan, make_plan, uniform
from optiq.sensitivity import kl_sweep
from optiq.statistics import Statistics

MXFP4 = parse_format('mxfp4')
CONFIG = dict(model_type='gpt_oss', vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
              head_dim=32, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, sliding_window=16, rope_theta=150000.,
              rope_scaling=dict(rope_type='yarn', factor=32., original_max_position_embeddings=4096,
                                beta_fast=32., beta_slow=1., truncate=False),
              quantization_config=dict(quant_method='mxfp4', modules_to_not_convert=['lm_head']))

@pytest.fixture(scope='module')
def oss(tmp_path_factory):
    "gpt-oss as its maker stores it"
    folder, rng = tmp_path_factory.mktemp('models')/'oss', np.random.default_rng(0)
    folder.mkdir()
    shapes = {k: v.shape for k, v in tree_flatten(gpt_oss.Model(gpt_oss.ModelArgs.from_dict(CONFIG)).parameters())}
    tensors = {k: rng.normal(0, .5/np.sqrt(s[-1]), s).astype(np.float32) for k, s in shapes.items() if '.experts.' not in k}
    for k in tensors:
        if 'norm' in k: tensors[k] += 1
    for i in range(2):
        p, many = f'model.layers.{i}.mlp.experts.', 4
        for name, out in (('gate_up_proj', 128), ('down_proj', 64)):
            tensors[f'{p}{name}_blocks'] = rng.integers(0, 256, (many, out, 2, 16), dtype=np.uint8)
            tensors[f'{p}{name}_scales'] = rng.integers(121, 124, (many, out, 2), dtype=np.uint8)
            tensors[f'{p}{name}_bias'] = rng.normal(0, .1, (many, out)).astype(np.float32)
    save_file(tensors, folder/'model.safetensors', {'format': 'pt'})
    (folder/'config.json').write_text(json.dumps(CONFIG))
    _write_tokenizer(folder)
    return Checkpoint(folder)

@pytest.fixture(scope='module')
def tokens(): return np.random.default_rng(1).integers(11, 500, (2, 24)).astype(np.int32)

@pytest.fixture(scope='module')
def sweep(oss, tokens): return kl_sweep(oss, tokens, ['mxfp4', '4g32', '8g32', '2g32'], rounding='minmax', progress=False)

def plain_logits(folder, tokens): return np.array(load_model(folder)[0](mx.array(tokens)).astype(mx.float32))

def test_its_experts_are_listed_as_they_are_stored(oss, tokens):
    experts = [u for u in oss.units if u.kind.startswith('experts.')]
    assert len(experts) == 6 and {u.stored for u in experts} == {'mxfp4'} and not any(u.stored for u in oss.units if u not in experts)
    assert 'mxfp4' in oss.others and oss.quantized and not any('router' in u.path for u in oss.units)
    b = open_backend(oss)
    assert b.name == 'mlx'
    assert np.allclose(b.numpy(b.logits(tokens)), plain_logits(oss.folder, tokens), atol=1e-4)

def alike(c, tokens):
    "PyTorch and MLX hold the same weights, to the bit, and compute the same"
    b, m = (open_backend(c, name) for name in ('torch', 'mlx'))
    for u in c.units:
        x, y = b.unit_weight(u.path), m.unit_weight(u.path)
        assert (x.float().numpy() == np.array(y.astype(mx.float32))).all(), u.path
    x, y = b.numpy(b.logits(tokens)), m.numpy(m.logits(tokens))
    assert np.allclose(x, y, atol=.01*y.std()) # of gpt-oss, mlx-lm rounds the ramp of yarn
    return b, m

def test_pytorch_measures_what_the_codes_stand_for(oss, tokens, sweep):
    b, _ = alike(oss, tokens)
    mine = kl_sweep(b, tokens, sweep.formats, rounding='minmax', progress=False)
    assert mine.values.keys() == sweep.values.keys()
    for k, v in mine.values.items(): assert np.allclose(v, sweep.values[k], rtol=.02, atol=1e-7), k
    assert all(Statistics(b, tokens)[u.path] is not None for u in oss.units if u.kind != 'embed') # transposed experts are heard, too

@pytest.mark.parametrize('architecture', ['llama', 'qwen3_moe'])
def test_pytorch_opens_what_mlx_packed(tmp_path, tokens, architecture):
    "Also where transformers keeps all experts of a layer in one tensor"
    c = Checkpoint(tiny(architecture, tmp_path/'m', dtype='float32'))
    alike(convert(c, uniform(c, Format(4, 32)), tmp_path/'four'), tokens)

@pytest.fixture
def special(monkeypatch, tmp_path):
    "name ▸ a special form of `bench/families.json`, as a Checkpoint"
    monkeypatch.syspath_prepend(Path(__file__).parents[1]/'bench')
    import families
    def made(name):
        config, told = families.config_of('special', name, families.read_table())
        families.write_checkpoint(tmp_path/'s', config, told, 'hub', told.get('vision', False))
        return Checkpoint(tmp_path/'s')
    return made

def test_awq_is_measured_in_both_libraries(special, tokens):
    c = special('Llama in AWQ')
    assert 'awq' in c.others and {u.stored for u in c.units if u.block is not None} == {'4g64'}
    alike(c, tokens)

def test_gptq_is_refused_by_name_as_mlx_lm_does(special):
    with pytest.raises(ValueError, match='g_idx.*another library .gptq: .*full-precision model'): special('Llama in GPTQ')

@pytest.mark.parametrize('name, needs', {'DeepSeek V3 in FP8': 'accelerate', 'DeepSeek V3 in packed integers': 'compressed.tensors'}.items())
def test_what_pytorch_cannot_decode_here_is_refused_with_what_would_help(special, name, needs):
    c = special(name)
    if find_spec(needs.replace('.', '_')): pytest.skip(f'{needs} is installed')
    with pytest.raises(ValueError, match=f'(?s)is stored in codes.*by name, .*no counterpart.*by transformers, .*{needs}.*use `backend` mlx'):
        open_backend(c, 'torch')
    b = open_backend(c)
    assert b.name == 'mlx' and np.isfinite(b.numpy(b.logits(np.array([[5, 9, 200]])))).all()

def test_nvfp4_with_a_scale_of_its_own_is_measured_as_mlx_vlm_computes_it(special, tmp_path):
    from mlx_vlm.utils import load_model as load_vlm
    c = special('Qwen3-VL in NVFP4')
    packed = [u for u in c.units if u.stored == 'nvfp4']
    assert len(packed) == 14 and all(u.beside == 4 and not u.fixed for u in packed) and c.model_type == 'vlm'
    ids = np.array([[5, 9, 200, 31]])
    def plain(folder): return np.array(load_vlm(folder).language_model(mx.array(ids)).logits.astype(mx.float32))
    b = open_backend(c)
    mine = b.numpy(b.logits(dict(input_ids=ids, attention_mask=np.ones_like(ids))))
    assert np.allclose(mine, plain(c.folder), atol=1e-3*mine.std())
    half = {u.path for u in packed[::2]} # some in another format, the others as they are stored
    plan = make_plan(c, {u.path: Format(8, 32) if u.path in half or not u.stored and u.takes(Format(8, 32)) else u.kept for u in c.units})
    saved = convert(c, plan, tmp_path/'out')
    assert all(saved.formats[u.path] == (Format(8, 32) if u.path in half else parse_format('nvfp4')) for u in packed)
    assert np.allclose(plain(saved.folder), mine, atol=.1*mine.std()) # eight bits are close

def test_the_stored_format_is_a_candidate_with_no_kl_and_its_bytes(oss, sweep, tmp_path):
    experts = [u.path for u in oss.units if u.stored]
    assert not any((p, MXFP4) in sweep.values for p in experts) and all((p, Format(8, 32)) in sweep.values for p in experts)
    assert sweep.kl(experts[0], MXFP4) == 0 and sweep.kl(oss.units[0].path, MXFP4) > 0
    p = allocate(sweep, target_bpw=4.6)
    assert {p[path] for path in experts} <= {MXFP4, Format(2, 32)} # nothing wider is worth its bytes
    assert all(p.kl[path] == 0 for path in experts) and np.isfinite(p.predicted_kl)
    low = allocate(sweep, target_bpw=3.5)
    assert {low[path] for path in experts} & {Format(2, 32)} and np.isfinite(low.predicted_kl)
    assert {allocate(sweep, target_bpw=5, protect=experts, formats=['4g32', '8g32'])[path] for path in experts} == {MXFP4}
    p.save(tmp_path/'plan.json')
    assert dict(Plan.load(tmp_path/'plan.json')) == dict(p) and Plan.load(tmp_path/'plan.json').units == p.units
    sweep.save(tmp_path/'s.json')
    assert type(sweep).load(tmp_path/'s.json').units == oss.units

@pytest.mark.parametrize('target', [4.6, 3.5])
def test_what_is_kept_is_kept_bit_for_bit_and_the_rest_is_what_was_measured(oss, sweep, tokens, tmp_path, target):
    p = allocate(sweep, target_bpw=target)
    saved = convert(oss, p, tmp_path/'out')
    assert saved.formats == dict(p) and {u.stored for u in saved.units if p[u.path] == MXFP4} == {'mxfp4'}
    mine, theirs = (dict(tree_flatten(load_model(f)[0].parameters())) for f in (oss.folder, saved.folder))
    kept = [path for path, f in p.items() if f == MXFP4 and oss.unit[path].stored]
    assert kept
    for name in (f'{path}.{part}' for path in kept for part in ('weight', 'scales')): assert mx.array_equal(mine[name], theirs[name])
    b = open_backend(oss)
    with b.swapped({path: (lambda w, f=f, u=oss.unit[path]: w if u.keeps(f) else mx.dequantize(
            *mx.quantize(w, f.group_size, f.bits, f.mode), group_size=f.group_size, bits=f.bits, mode=f.mode)) for path, f in p.items()}):
        want = b.numpy(b.logits(tokens))
    assert np.allclose(plain_logits(saved.folder, tokens), want, atol=2e-4)
    again = convert(saved, uniform(saved, Format(8, 32)), tmp_path/'again') # what MLX packed is a source, too
    assert set(again.formats.values()) == {Format(8, 32)}

@pytest.mark.parametrize('wanted', ['quantized', 'nothing'])
def test_a_folder_of_mlx_is_a_source(tmp_path, tokens, wanted):
    c = Checkpoint(tiny('qwen3', tmp_path/'m'))
    four = convert(c, uniform(c, Format(4, 32)), tmp_path/'four')
    assert {u.stored for u in four.units} == {'4g32'}
    if wanted == 'nothing':
        with pytest.raises(ValueError, match='stored in 4g32 already'): kl_sweep(four, tokens, ['4g32'], rounding='minmax', progress=False)
    else:
        sweep = kl_sweep(four, tokens, ['2g32', '4g32'], rounding='search', progress=False)
        p = allocate(sweep, target_bpw=3)
        assert p.counts().keys() == {Format(2, 32), Format(4, 32)}
        assert dict(convert(four, p, tmp_path/'three', sweep).formats) == dict(p)

def test_what_no_loader_reads_is_refused_by_name(tmp_path):
    folder = tiny('llama', tmp_path/'m', dtype='float32')
    tensors = load_file(folder/'model.safetensors')
    tensors['model.layers.0.self_attn.q_proj.weight'] = np.zeros((4, 4), np.uint8)
    save_file(tensors, folder/'model.safetensors', {'format': 'pt'})
    for method in ('bitsandbytes', 'hqq', 'fp8', 'compressed-tensors'):
        config = json.loads((folder/'config.json').read_text())
        (folder/'config.json').write_text(json.dumps(config | dict(quantization_config=dict(quant_method=method))))
        with pytest.raises(ValueError, match=f'another library .{method}.*full-precision model'): Checkpoint(folder)

def test_nvfp4_of_mlx_is_kept_and_others_are_refused_by_name(tmp_path):
    "mlx-lm opens dense NVFP4 only as MLX stores it"
    c = Checkpoint(tiny('llama', tmp_path/'m', dtype='float32'))
    four = convert(c, uniform(c, parse_format('nvfp4')), tmp_path/'four')
    assert {u.stored for u in four.units} == {'nvfp4'}
    kept = convert(four, uniform(four, parse_format('nvfp4')), tmp_path/'kept')
    mine, theirs = (load_file(f.folder/'model.safetensors') for f in (four, kept))
    assert all((mine[k] == theirs[k]).all() for k in mine) and mine.keys() == theirs.keys()
    config, name = json.loads((c.folder/'config.json').read_text()), 'model.layers.0.self_attn.q_proj.weight'
    tensors = load_file(c.folder/'model.safetensors')
    out, width = tensors.pop(name).shape
    codes, scales, whole = np.zeros((out, width//2), np.uint8), np.ones((out, width//16), np.uint8), np.ones(1, np.float32)
    forms = {'modelopt': dict(quant_algo='NVFP4'), 'compressed-tensors': dict(format='nvfp4-pack-quantized')}
    for by, said in forms.items():
        packed = ('', '_scale', '_scale_2') if by == 'modelopt' else ('_packed', '_scale', '_global_scale')
        save_file(tensors | dict(zip([name+p for p in packed], (codes, scales, whole))), c.folder/'model.safetensors', {'format': 'pt'})
        (c.folder/'config.json').write_text(json.dumps(config | dict(quantization_config=dict(said, quant_method=by))))
        with pytest.raises(ValueError, match=f'another library .{by}.*take the full-precision model'): Checkpoint(c.folder)
