"The random checkpoints load through the real loaders, and two libraries agree on what they say"
import json, math, struct
import mlx.core as mx
import numpy as np
import pytest
from optiq.material.configs import _CONFIGS, _SHAPES, hub_config
from optiq.material.tiny import _hub_tensors, tiny

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
TEXT = ['qwen3', 'qwen3_moe', 'qwen3_5', 'llama', 'gemma3', 'mistral', 'phi3']
IDS = [[72 + 13*i % 400 for i in range(40)]]  # longer than gemma3's sliding window

def header(path):
    with open(path, 'rb') as f: found = json.loads(f.read(struct.unpack('<Q', f.read(8))[0]))
    found.pop('__metadata__')
    return found

@pytest.mark.parametrize('architecture', TEXT)
def test_two_libraries_agree(architecture, tmp_path):
    import mlx_lm
    folder = tiny(architecture, tmp_path, dtype='float32')
    reference, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True)
    assert not found['missing_keys'] and not found['mismatched_keys']
    assert all(name.startswith(('mtp', 'model.visual')) for name in found['unexpected_keys'])
    with torch.no_grad(): expected = reference(torch.tensor(IDS)).logits.numpy()
    model, tokenizer = mlx_lm.load(str(folder))
    logits = np.array(model(mx.array(IDS)).astype(mx.float32))
    assert 0.5 < expected.std() < 5
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    text = 'Some text — with “anything”.'
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token == '<|im_end|>'

@pytest.mark.parametrize('architecture', TEXT)
def test_hub_form(architecture, tmp_path):
    folder = tiny(architecture, tmp_path)
    config = json.loads((folder/'config.json').read_text())
    assert config['architectures'] and config['model_type']
    for name in 'generation_config', 'tokenizer', 'tokenizer_config': assert (folder/f'{name}.json').exists()
    assert len(json.loads((folder/'tokenizer.json').read_text())['model']['vocab']) == 512
    names = header(folder/'model.safetensors')
    assert all(info['dtype'] == ('F32' if name.endswith('A_log') else 'BF16') for name, info in names.items())
    assert not any('gate_up_proj' in name for name in names) or architecture == 'phi3'
    linear = [info['shape'][1] for name, info in names.items() if len(info['shape']) == 2]
    assert all(width % 128 == 0 for width in linear)

def test_experts_are_apart():
    names = _hub_tensors(hub_config('qwen3_moe'))
    assert names['model.layers.0.mlp.experts.7.down_proj.weight'] == (128, 128)
    assert 'model.layers.0.mlp.gate.weight' in names

def test_generates(tmp_path):
    import mlx_lm
    model, tokenizer = mlx_lm.load(str(tiny('qwen3_5', tmp_path)))
    prompt = tokenizer.apply_chat_template([dict(role='user', content='Hello')], add_generation_prompt=True)
    assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=4)

def test_vision(tmp_path):
    mlx_vlm = pytest.importorskip('mlx_vlm')
    from PIL import Image
    folder = tiny('qwen3_vl', tmp_path)
    model, processor = mlx_vlm.load(str(folder))
    prompt = mlx_vlm.apply_chat_template(processor, model.config, 'What is this?', num_images=1)
    image = Image.new('RGB', (256, 256), 'teal')
    out = mlx_vlm.generate(model, processor, prompt, image=[image], max_tokens=3)
    assert out.text
    _, found = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(found[kind] for kind in ['missing_keys', 'mismatched_keys', 'unexpected_keys'])

def test_speech(tmp_path):
    pytest.importorskip('mlx_audio')
    from mlx_audio.stt import load
    folder = tiny('qwen3_asr', tmp_path)
    model = load(str(folder))
    sound = np.sin(np.arange(16000, dtype=np.float32)/20)
    assert model.generate(sound, max_tokens=3).text is not None

def test_shards(tmp_path):
    one, two = tiny('llama', tmp_path/'one'), tiny('llama', tmp_path/'two', max_shard=1e6)
    place = json.loads((two/'model.safetensors.index.json').read_text())['weight_map']
    assert len(set(place.values())) > 1
    whole = mx.load(str(one/'model.safetensors'))
    parts = {name: mx.load(str(two/file))[name] for name, file in place.items()}
    assert whole.keys() == parts.keys()
    assert all(mx.array_equal(whole[name], parts[name]) for name in whole)

def test_seed(tmp_path):
    a, b, c = (tiny('qwen3', tmp_path/str(i), seed=seed) for i, seed in enumerate([0, 0, 1]))
    read = lambda folder: (folder/'model.safetensors').read_bytes()
    assert read(a) == read(b) != read(c)

def test_changed_shape(tmp_path):
    folder = tiny('qwen3', tmp_path, shape=dict(hidden_size=192, num_hidden_layers=1))
    names = header(folder/'model.safetensors')
    assert names['model.layers.0.mlp.up_proj.weight']['shape'] == [256, 192]

@pytest.mark.parametrize('architecture, shape, billions', [
    ('qwen3', '0.6B', 0.596), ('qwen3', '1.7B', 1.72), ('qwen3', '8B', 8.19), ('qwen3_moe', '30B-A3B', 3.11),
    ('qwen3_vl', '2B', 2.13), ('qwen3_asr', '0.6B', 0.78)])
def test_real_sizes(architecture, shape, billions):
    count = sum(map(math.prod, _hub_tensors(hub_config(architecture, shape)).values()))
    assert count/1e9 == pytest.approx(billions, rel=0.01)

def test_made_twice_a_checkpoint_is_the_same(tmp_path):
    one, two = (tiny("qwen3_vl", tmp_path/n) for n in "ab")
    assert (one/"config.json").read_text() == (two/"config.json").read_text()

def test_speech_has_the_published_linear_layers():
    shapes = _hub_tensors(hub_config('qwen3_asr', '0.6B'))
    linear = [name for name, shape in shapes.items() if len(shape) == 2 and 'embed_tokens' not in name]
    assert len(linear) == 307 and sum('audio_tower' in name for name in linear) == 111

def test_every_named_shape_has_an_architecture():
    assert _SHAPES.keys() <= _CONFIGS.keys()

@pytest.mark.parametrize('args, said', [
    (('bert',), 'qwen3_moe'), (('qwen3', '9B'), '1.7B'), (('phi3', '4B'), 'none')])
def test_unknown_names_say_what_there_is(args, said):
    with pytest.raises(ValueError, match=said): hub_config(*args)
