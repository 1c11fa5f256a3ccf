"Models of several parts: their units, the replay of their own forward pass, and what plain loaders make of them"
import json, shutil
import numpy as np
import pytest

mx = pytest.importorskip('mlx.core')
pytest.importorskip('mlx_vlm'), pytest.importorskip('mlx_audio')
from PIL import Image
import apart
from optiq.backends.open import open_backend
from optiq.backends.parts import ReplayBackend, _narrow
from optiq.calibration import block_hashes, fingerprint, overlap, positions, shape_of
from optiq.convert import convert, overrides_of_saved
from optiq.evals.perplexity import evaluate, overrides_of
from optiq.formats import AS_IS, Format
from optiq.knapsack import allocate
from optiq.plan import default_of_vlm, make_plan, baseline_plans, uniform
from optiq.models import Checkpoint
from optiq.rounding import as_overrides, _outside_before, round_model, round_to_files
from optiq.measure.kl import kl_divergence, measure, perturb
from optiq.measure.sweep import Sweep
from optiq.sensitivity import kl_sweep
from optiq.material.configs import hub_config
from optiq.material.tiny import _hub_tensors, tiny

VISION, ALL = ['qwen2_vl', 'qwen2_5_vl', 'qwen3_vl'], ['qwen2_vl', 'qwen2_5_vl', 'qwen3_vl', 'qwen3_asr', 'whisper']

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('parts')
    small = dict(max_source_positions=100) # 2 s of sound instead of 30
    return {a: tiny(a, root/a, shape=small if a == 'whisper' else None, dtype='float16' if a == 'whisper' else 'float32') for a in ALL}

@pytest.fixture(scope='module')
def backends(folders): return {a: open_backend(Checkpoint(folders[a])) for a in ALL}

def vision_sample(c, seed=0, size=(56, 84)):
    from mlx_vlm import apply_chat_template
    from mlx_vlm.utils import load_processor, prepare_inputs
    p = load_processor(c.folder, True)
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))
    made = prepare_inputs(p, images=[image.resize((84, 56))], prompts=apply_chat_template(p, c.config, 'What is this?', num_images=1))
    return {k: np.array(v) for k, v in made.items() if v is not None}

def sample_for(b, seed=0):
    c, r = b.checkpoint, np.random.default_rng(seed)
    kind = c.config['model_type']
    if kind == 'whisper': return dict(mel=r.standard_normal((1, 200, 80)), tokens=r.integers(0, 512, (1, 9)), scored=np.eye(9)[None, 3:7].sum(1))
    if c.model_type == 'vlm': return vision_sample(c, seed)
    features, mask, n = b.model._preprocess_audio(r.standard_normal(8000).astype('f4'))
    return dict(input_ids=np.array(b.model._build_prompt(n, 'English')),
                input_features=np.array(features), feature_attention_mask=np.array(mask))

@pytest.fixture(scope='module')
def samples(backends): return {a: [sample_for(b, seed) for seed in range(2)] for a, b in backends.items()}

def plain(b, sample, weights={}):
    "The model's own call with other weights in its layers; nothing of the replay"
    before = {p: b.module(p).weight for p in weights}
    for p, f in weights.items(): b.module(p).weight = f(b.unit_weight(p)).astype(mx.float32)
    out = b.model(**{k: mx.array(_narrow(v)) for k, v in sample.items() if k != 'scored'})
    for p, w in before.items(): b.module(p).weight = w
    z = getattr(out, 'logits', out)
    return z[:, mx.array(positions(sample))]

@pytest.mark.parametrize('architecture', ALL)
def test_every_probe_is_what_a_whole_forward_pass_gives(architecture, backends, samples):
    b, s = backends[architecture], samples[architecture][0]
    assert isinstance(b, ReplayBackend)
    first = {u.block: u for u in reversed(b.checkpoint.units) if u.shape[-1] % 64 == 0}
    todo = [(u, Format(4, 64)) for u in [*first.values(), *(u for u in b.checkpoint.units if u.block is None)]]
    mine, z_p = measure(b, [s], todo)[:, 0], plain(b, s)
    for (u, f), kl in zip(todo, mine):
        want = float(kl_divergence(mx, z_p, plain(b, s, perturb((u, f)))).mean())
        assert kl > 1e-6 and abs(kl/want-1) < 1e-4, u.path

@pytest.mark.parametrize('architecture', ALL)
def test_only_what_has_to_run_runs(architecture, backends, samples):
    b, s, ran = backends[architecture], samples[architecture][0], []
    passed, z = b.record(s)
    class Counting(ReplayBackend):
        def whole_answer(self, i, *args): ran.append(i); return super().whole_answer(i, *args)
    b.__class__ = Counting
    try:
        assert mx.array_equal(b.head(passed), z) and ran == []
        for u in b.checkpoint.units:
            ran.clear()
            mx.eval(b.head(passed.at(u.block), {u.path: lambda w: w*.5}))
            if u.block is not None: assert ran == list(range(u.block, b.n_blocks)), u.path
            if u.kind in ('embed', 'lm_head'): assert all(i >= list(b.checkpoint.blocks.values())[0] for i in ran), u.path
    finally: b.__class__ = ReplayBackend

def test_a_sample_does_not_depend_on_the_one_before(backends, samples):
    b = backends['qwen2_vl'] # it remembers the positions of the last image
    words = dict(input_ids=samples['qwen2_vl'][0]['input_ids'][:, :6])
    alone = np.array(b.logits(words))
    b.logits(samples['qwen2_vl'][0])
    assert (np.array(b.logits(words)) == alone).all()
    batch = words['input_ids'] # a row of text is a sample too
    assert (np.array(b.logits(batch)) == alone).all()
    with pytest.raises(ValueError, match='one sample at a time'): b.logits(np.concatenate([batch]*2))

def test_parts_and_blocks(backends):
    c = backends['qwen3_vl'].checkpoint
    assert c.blocks == {'vision_tower.blocks': 3, 'language_model.model.layers': 4} and c.n_blocks == 7 and c.tied
    parts = {u.path: u.part for u in c.units}
    assert parts['vision_tower.merger.linear_fc1'] == parts['vision_tower.deepstack_merger_list.0.linear_fc1'] == 'projector'
    assert {u.part for u in c.units if u.block is not None and u.block < 3} == {'vision'}
    assert {u.part for u in c.units if u.block is not None and u.block > 2} == {'language'}
    asr = backends['qwen3_asr'].checkpoint
    assert all(u.fixed == (u.part == 'encoder') for u in asr.units) # mlx-audio opens its audio tower in one form only
    whisper = backends['whisper'].checkpoint
    assert not any(u.fixed for u in whisper.units) and {u.part for u in whisper.units} == {'encoder', 'decoder'}
    paths = [u.path for u in c.units]
    assert paths.index('vision_tower.merger.linear_fc1') > paths.index('vision_tower.blocks.2.attn.qkv')
    assert 'vision_tower.merger.linear_fc1' in _outside_before(c.unit, 3) and _outside_before(c.unit, None) == []
    assert 'language_model.lm_head' in _outside_before(backends['qwen2_5_vl'].checkpoint.unit, None)

def test_widths_that_no_group_divides_stay(backends, samples):
    b = backends['qwen2_5_vl']
    sweep = kl_sweep(b, samples['qwen2_5_vl'][:1], ['3g64', '8g64'], progress=False, rounding='minmax')
    assert {u.kind for u in sweep.left} == {'down_proj'} and len(sweep.left) == 3 and '3 units of a width' in repr(sweep)
    plan = allocate(sweep, target_bpw=5)
    assert all(plan[u.path] == AS_IS for u in sweep.left) and 4.5 < plan.nominal_bpw <= 5
    assert {p.name for p in baseline_plans(b.checkpoint)} >= {'uniform 4g64', 'mlx-vlm default 4g64'}
    default = default_of_vlm(b.checkpoint)
    assert {u.part for u in b.checkpoint.units if default[u.path] == AS_IS} == {'vision', 'projector'}

PLAIN = '''
import json, sys, numpy as np, mlx.core as mx
for kind, folder, file, out in json.loads(sys.argv[1]):
    if kind == 'vlm':
        import mlx_vlm
        model, processor = mlx_vlm.load(folder)
        from PIL import Image
        prompt = mlx_vlm.apply_chat_template(processor, model.config, 'What?', num_images=1)
        assert mlx_vlm.generate(model, processor, prompt, image=[Image.new('RGB', (84, 56), 'teal')], max_tokens=2) is not None
    else:
        from mlx_audio.stt import load
        model = load(folder)
    z = model(**{k: mx.array(v) for k, v in np.load(file).items()})
    np.save(out, np.array(getattr(z, 'logits', z).astype(mx.float32)))
assert not any(m.split('.')[0] == 'optiq' for m in sys.modules)
'''

def mixed(c):
    formats = [Format(3, 32), Format(4, 64), Format(8, 64), Format(5, 32), AS_IS]
    if c.config['model_type'] != 'whisper': formats.append(Format(4, 32, 'mxfp4'))
    return make_plan(c, {u.path: f if u.takes(f := formats[i % len(formats)]) else AS_IS for i, u in enumerate(c.units)})

@pytest.fixture(scope='module')
def opened(backends, samples, tmp_path_factory):
    "Where each architecture, converted, and what plain loaders compute with it lie; one process, as its imports are what takes long"
    root, jobs = tmp_path_factory.mktemp('plain'), []
    for a, b in backends.items():
        c, s, folder = b.checkpoint, samples[a][0], root/a
        saved = convert(c, mixed(c), folder/'m')
        assert saved.model_type == c.model_type and dict(saved.formats) == dict(mixed(c))
        np.savez(folder/'in.npz', **{k: _narrow(v) for k, v in s.items() if k != 'scored'})
        jobs.append([c.model_type, *(str(folder/n) for n in ('m', 'in.npz', 'out.npy'))])
    done = apart.run('-c', PLAIN, json.dumps(jobs), cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    return root

@pytest.mark.parametrize('architecture', ALL)
def test_plain_loaders_open_what_is_converted(architecture, backends, samples, opened):
    b, s, folder = backends[architecture], samples[architecture][0], opened/architecture
    theirs, ours = np.load(folder/'out.npy')[:, positions(s)], b.numpy(b.logits(s, overrides_of(mixed(b.checkpoint))))
    assert abs(theirs-ours).max() < (3e-2 if architecture == 'whisper' else 2e-3)*abs(ours).max() # Whisper is opened in float16
    again = b.numpy(b.logits(s, overrides_of_saved(folder/'m')))
    assert abs(again-ours).max() < 1e-4

def test_whisper_cannot_take_float_modes(backends, tmp_path):
    c = backends['whisper'].checkpoint # mlx-audio turns their scales into float16
    with pytest.raises(ValueError): convert(c, uniform(c, 'mxfp4'), tmp_path/'m')
    assert not (tmp_path/'m').exists()

def test_a_fixed_unit_is_refused(backends, tmp_path):
    c = backends['qwen3_asr'].checkpoint
    plan = make_plan(c, {u.path: Format(4, 64) for u in c.units})
    with pytest.raises(ValueError, match='audio_tower.*give it the format as-is'): convert(c, plan, tmp_path/'m')

def test_rounding_goes_through_all_parts(backends, samples, tmp_path):
    b, some = backends['qwen3_vl'], samples['qwen3_vl']
    plan = uniform(b.checkpoint, '3g64')
    done = {m: as_overrides(dict(round_model(b, some, plan, m))) for m in ('minmax', 'search', 'gptq')}
    assert all(set(d) == set(plan) for d in done.values())
    kl = {n: s.kl.mean() for n, s in evaluate(b, some, done).items()}
    assert kl['gptq'] < kl['search'] < kl['minmax'] and kl['gptq'] < kl['minmax']/2
    saved = convert(b.checkpoint, plan, tmp_path/'m', quantizer=round_to_files(b, some, plan, 'search', tmp_path))
    assert abs(evaluate(b, some, dict(s=overrides_of_saved(saved)))['s'].kl.mean()-kl['search']) < 1e-5

def test_sweep_resumes_and_knows_its_samples(backends, samples, tmp_path):
    b, some, file = backends['qwen3_vl'], samples['qwen3_vl'], tmp_path/'s.jsonl'
    whole = kl_sweep(b, some, ['4g64'], out=file, progress=False, rounding='minmax')
    lines = file.read_text().splitlines(True)
    file.write_text(''.join(lines[:30])+lines[30][:20])
    again = kl_sweep(b, some, ['4g64'], out=file, progress=False, rounding='minmax')
    assert all((whole.values[k] == again.values[k]).all() for k in whole.values) and whole.header['noise'] < 1e-9
    assert {u.part for u in Sweep.load(file).units} == {'vision', 'projector', 'language'}
    assert set(whole.to_frame().part) == {'vision', 'projector', 'language'}
    with pytest.raises(ValueError, match='tokens'): kl_sweep(b, some[:1]*2, ['4g64'], out=file, progress=False, rounding='minmax')
    with pytest.raises(ValueError, match='exact'): kl_sweep(b, some, ['4g64'], method='gradient', progress=False, rounding='minmax')

def test_samples(samples):
    a, b = samples['qwen3_vl']
    assert fingerprint([a]) == fingerprint([dict(a)]) != fingerprint([b]) and shape_of([a, b])[0] == 2
    assert overlap(block_hashes([a]), [a | dict(input_ids=a['input_ids'][:, ::-1])]) == 1 and overlap(block_hashes([a]), [b]) == 0

def test_errors(folders, tmp_path):
    for kind in ('vlm', 'audio'):
        with pytest.raises(ValueError, match=r'^demo: config.json has no .*_config, so it has no') as e: Checkpoint('demo', model_type=kind)
        assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='auto, llm, vlm, audio'): Checkpoint('demo', model_type='video')
    with pytest.raises(ValueError, match="no backend 'torch'"): open_backend(Checkpoint(folders['whisper']), 'torch')
    from safetensors.numpy import load_file, save_file
    shutil.copytree(folders['qwen3_vl'], tmp_path/'m')
    kept = {k: v for k, v in load_file(tmp_path/'m'/'model.safetensors').items() if 'visual' not in k}
    save_file(kept, tmp_path/'m'/'model.safetensors')
    assert Checkpoint(tmp_path/'m').model_type == 'llm' # its vision tower was left out

def test_a_missing_loader_says_what_to_install(monkeypatch):
    import optiq.models as models
    monkeypatch.setattr(models, 'find_spec', lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'optiq-mlx\[audio\]'"):
        models._check_type('m', dict(model_type='whisper'), 'audio')

def linear_layers(config):
    "Linear layers as published counts have them: matrices, embeddings apart"
    return [n for n, s in _hub_tensors(config).items() if len(s) == 2 and 'embed' not in n]

def test_published_sizes_of_qwen3_asr():
    config = hub_config('qwen3_asr', '0.6B')
    shapes, names = _hub_tensors(config), linear_layers(config)
    size = {n: int(np.prod(s)) for n, s in shapes.items()}
    decoder = sum(size[n] for n in names if 'audio_tower' not in n)
    total = sum(size.values())
    assert len(names) == 307 and round(2*total/2**20) == 1492
    assert abs((2*(total-decoder)+5*decoder/8)/2**20-914.9) < .5 # 5 nominal bits of the decoder, the rest in bfloat16

def test_linear_layers_of_qwen3_vl():
    assert len(linear_layers(hub_config('qwen3_vl', '2B'))) == 300 # the head, tied to the embedding, is the 301st
