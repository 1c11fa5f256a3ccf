"The witness, pictures as samples, and what is wrong with some pictures"
import importlib.util
import json
import shutil
from pathlib import Path
import numpy as np
import pytest

from optiq.material.diagrams import _LAYOUTS, _diagram, diagrams, prompt
from optiq.models import Checkpoint

FOLDER = Path(__file__).parents[1]/'models'/'witness'
pytest.importorskip('mlx_vlm')

@pytest.fixture(scope='module')
def training():
    "models/witness/train.py as a module"
    spec = importlib.util.spec_from_file_location('witness_train', FOLDER/'train.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

@pytest.fixture(scope='module')
def witness():
    "The trained checkpoint"
    if not (FOLDER/'model.safetensors.index.json').is_file(): pytest.skip('models/witness has no weights here; train.py makes them')
    return Checkpoint(FOLDER)

@pytest.fixture(scope='module')
def model(training, witness):
    "The witness as its training script computes it"
    from safetensors.torch import load_file
    found = training.Witness(json.loads((FOLDER/'config.json').read_text()), first(training))
    found.load_state_dict({k: v.float() for f in witness.files for k, v in load_file(f).items()})
    return found.eval().requires_grad_(False)

def tokenizer():
    from tokenizers import Tokenizer
    return Tokenizer.from_file(str(FOLDER/'tokenizer.json'))

def first(training): return len(tokenizer().encode(training.HEAD).ids)

def test_it_sees(training, model):
    exam = training.Exam(200, tokenizer(), 104, 11, 'cpu')
    sees, guesses = exam.score(model, batch=100), exam.score(model, True, batch=100)
    assert sees['all'] >= .8, sees
    assert guesses['all'] < .25+3*(.25*.75/200)**.5, guesses

def test_all_three_libraries_agree(training, model, witness):
    "The training script, transformers and mlx-vlm compute the same logits"
    import torch
    from transformers import AutoModelForImageTextToText
    from optiq.backends.open import open_backend
    from optiq.families.vision import load_processor, sample
    d, q = diagrams(5)[4]
    s = sample(witness, load_processor(witness), d.draw(), prompt(q))
    ids = torch.tensor(s['input_ids'], dtype=torch.long)
    assert ids[0].tolist() == tokenizer().encode(training.chat(prompt(q))).ids
    mine = model(torch.from_numpy(training.pixels(d).copy())[None], ids[None])[0].numpy()
    native = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad(): theirs = native(
        input_ids=ids, pixel_values=torch.tensor(s['pixel_values']), image_grid_thw=torch.tensor(s['image_grid_thw']),
        mm_token_type_ids=(ids == witness.config['image_token_id']).int()).logits[0].numpy()
    scored = np.ones_like(s['input_ids'])
    b = open_backend(witness)
    mlx = b.numpy(b.logits(s | dict(scored=scored)))[0]
    assert abs(theirs-mine).max() < 1e-3*abs(mine).max() and abs(mlx-mine).max() < 1e-3*abs(mine).max()

def test_a_sure_model_is_no_quantized_one(witness):
    "Its KLs are tiny, and still a sweep of it is one; weights that were quantized before are refused"
    from optiq.backends.open import open_backend
    from optiq.formats import Format, quantize_dequantize
    from optiq.measure.log import SweepLog
    from optiq.sensitivity import kl_sweep
    from optiq.families.vision import samples
    def on_the_grid(w):
        "Sixteen steps in each group, both ends among them: what 4 bits leave as it is"
        g = w.reshape(-1, 64)
        q = (g/g.abs().amax(1, keepdim=True)*8).round().clamp(-8, 7)
        q[:, 0], q[:, 1] = -8, 7
        w = (q/256).reshape(w.shape)
        assert (quantize_dequantize(w, fmt) == w).all()
        return w
    b, fmt = open_backend(witness), Format(4, 64)
    log = SweepLog(b, samples(witness, n=2), [fmt])
    for p in log.passes: log.add(p, np.full((len(p.todo), p.stop-p.start), 1e-9))
    assert log.finish().formats == [fmt]
    b = open_backend('demo', 'torch')
    for u in b.checkpoint.units: b.slots[u.path][0].data = on_the_grid(b.slots[u.path][0].data)
    with pytest.raises(ValueError, match='quantized before'): kl_sweep(b, np.arange(2, 18)[None], [fmt], progress=False, rounding='minmax')

def test_demo(blind, tmp_path):
    "Tables, figures and a model, from whatever sees"
    from PIL import Image
    from optiq.show.demos import vlm as demo
    (tmp_path/'pictures').mkdir()
    for i in range(40): Image.new('RGB', (64, 48), (6*i, 0, 0)).save(tmp_path/'pictures'/f'{i}.png') # shorter than diagrams
    found = demo(blind.folder, True, tmp_path/'m', tmp_path/'pictures')
    found.save(tmp_path/'d')
    assert {p.name for p in (tmp_path/'d').iterdir()} == {'.optiq', 'tables.txt', 'demo.json', 'quality.png', 'sensitivity.png'}
    rows = {r['name']: r for r in found.tables[0].rows}
    assert rows['optiq, bytes of 4']['size_mb'] <= rows['uniform 4']['size_mb'] and rows['uniform 2']['kl'] > rows['as it is']['kl'] == 0
    assert [r[0] for r in found.tables[1].rows] == ['vision', 'projector', 'language'] and len(found.published) > 0
    assert Checkpoint(tmp_path/'m').formats == dict(found.found['plans']['optiq, bytes of 4'])

def test_shards_are_small(witness): assert len(witness.files) > 1 and all(f.stat().st_size <= 15e6 for f in witness.files)

@pytest.fixture(scope='module')
def blind(tmp_path_factory):
    "A Qwen3-VL of random weights"
    from optiq.material.tiny import tiny
    return Checkpoint(tiny('qwen3_vl', tmp_path_factory.mktemp('vlm')/'model'))

def test_samples_of_a_folder(blind, tmp_path):
    from PIL import Image
    from optiq.calibration import fingerprint, positions
    from optiq.families.vision import samples
    for i in range(12): Image.new('RGB', (64, 48), (20*i, 0, 0)).save(tmp_path/f'{i}.png')
    train, test = samples(blind, tmp_path, 4), samples(blind, tmp_path, 1, 'test')
    assert len(train) == 4 and fingerprint(train) != fingerprint(test)
    for s in train: # no answer is known: all that comes after the picture is scored
        at = np.flatnonzero(s['input_ids'][0] == blind.config['image_token_id'])[-1]
        assert list(positions(dict(s, scored=s['scored'][0]))) == list(range(at+1, s['input_ids'].shape[1]))
    with pytest.raises(ValueError, match='pictures on the test side'): samples(blind, tmp_path, 50, 'test')
    with pytest.raises(FileNotFoundError, match='no pictures'): samples(blind, 'nowhere')
    lines = [dict(image=f'{i}.png', question='How red?', answer='quite') for i in range(12)]
    (tmp_path/'questions.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    asked, = samples(blind, tmp_path, 1, 'all')
    assert 1 < asked['scored'].sum() < 8 and asked['scored'].shape == asked['input_ids'].shape

def test_coco(blind, monkeypatch):
    "By name, its sides apart, with captions for answers; a line that helps where it cannot be had"
    import datasets
    from PIL import Image
    from optiq.material.problems import is_test
    from optiq.families.vision import _from_coco, samples
    class Stored(list): # what `load_dataset` gives, as far as it is used
        def __getitem__(self, i): return [r[i] for r in self] if isinstance(i, str) else list.__getitem__(self, i)
    image = Image.new('RGB', (64, 48), 'red')
    rows = Stored(dict(image=image, file_name=f'{i:012}.jpg', answer=[f' A picture, {i}.', 'Red']) for i in range(60))
    def load_dataset(name, split): return dict(val=rows)[split] if name == 'lmms-lab/COCO-Caption2017' else None
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    sides = {side: {r['answer'] for r in _from_coco(60, side, 1)} for side in ('train', 'test')}
    assert sides['test'] == {f'A picture, {i}.' for i in range(60) if is_test(f'{i:012}.jpg')} and sides['test']
    assert not sides['train'] & sides['test'] and len(sides['train'] | sides['test']) == 60
    one, = samples(blind, 'coco', 1)
    assert one['scored'].sum() > 3
    def gone(name, split): raise OSError('no network')
    monkeypatch.setattr(datasets, 'load_dataset', gone)
    with pytest.raises(ConnectionError, match='coco cannot be fetched .OSError.; give a folder of pictures'): samples(blind, 'coco', 1)

def test_bad_pictures(blind, tmp_path):
    from PIL import Image
    from optiq.families.vision import load_processor, read_image, sample
    (tmp_path/'text.png').write_text('this is no picture')
    with pytest.raises(ValueError, match='not a picture that Pillow can read'): read_image(tmp_path/'text.png')
    whole = Image.new('RGB', (64, 64), 'red')
    whole.save(tmp_path/'cut.png')
    (tmp_path/'cut.png').write_bytes((tmp_path/'cut.png').read_bytes()[:60])
    with pytest.raises(ValueError, match='not a picture that Pillow can read'): read_image(tmp_path/'cut.png')
    with pytest.raises(FileNotFoundError, match='no picture'): read_image(tmp_path/'none.png')
    p = load_processor(blind)
    with pytest.raises(ValueError, match='too narrow'): sample(blind, p, Image.new('RGB', (2, 500)), 'What?')
    long = sample(blind, p, Image.new('RGB', (16, 16*150)), 'What?') # narrow, and allowed
    assert long['image_grid_thw'].prod() == len(long['pixel_values'])
    assert sample(blind, p, Image.new('L', (1, 1)), 'What?')['pixel_values'].shape[1] == 1536 # grey, a pixel

def test_no_processor(blind, tmp_path):
    from optiq.families.vision import load_processor, samples
    folder = shutil.copytree(blind.folder, tmp_path/'model')
    (folder/'preprocessor_config.json').unlink()
    with pytest.raises(ValueError, match='has no preprocessor_config.json'): load_processor(Checkpoint(folder))
    with pytest.raises(ValueError, match='has no preprocessor_config.json'): samples(Checkpoint(folder), n=1)

def test_a_cut_picture_has_an_entry_for_each_tile():
    "DeepSeek-VL2 of mlx-vlm asks for as many; beyond the end it reads what lies in memory"
    from optiq.families.vision import _crops_of_tiles
    tiles, crops = np.zeros((1, 3, 3, 4, 4)), np.array([[[2, 1]]])
    assert _crops_of_tiles(dict(pixel_values=tiles, images_spatial_crop=crops))['images_spatial_crop'].tolist() == [[[2, 1], [0, 0], [0, 0]]]
    for other in dict(pixel_values=tiles), dict(pixel_values=[tiles[0], tiles[0]], images_spatial_crop=crops[0]): # DeepSeek-OCR
        assert _crops_of_tiles(other) == other

def test_text_models_cannot_see():
    from optiq.evals.ai2d import ai2d
    with pytest.raises(ValueError, match='no vision_config'): Checkpoint('demo', model_type='vlm')
    with pytest.raises(ValueError, match='cannot see'): ai2d('demo', 1, 'diagrams')

def test_answers_are_kept_and_gone_on_with(blind, tmp_path):
    from optiq.evals.ai2d import ai2d
    whole = ai2d(blind, 3, 'diagrams', out=tmp_path/'a.jsonl', new_tokens=2)
    lines = (tmp_path/'a.jsonl').read_text().splitlines()
    (tmp_path/'a.jsonl').write_text('\n'.join(lines[:2])+'\n')
    again = ai2d(blind, 3, 'diagrams', out=tmp_path/'a.jsonl', new_tokens=2)
    assert again.about['responses'] == whole.about['responses'] and (tmp_path/'a.jsonl').read_text().splitlines() == lines
    assert set(whole.metrics) == {'diagrams', 'diagrams:free'} and whole.rows[0]['diagrams_n'] == 3
    with pytest.raises(ValueError): ai2d(blind, 3, 'diagrams', out=tmp_path/'a.jsonl', new_tokens=3)

def test_every_layout_keeps_its_promises():
    import random
    r = random.Random(0)
    for layout in _LAYOUTS:
        for _ in range(30):
            d = _diagram(r, layout)
            labels = [n.label for n in d.nodes]
            assert 3 <= len(set(labels)) == len(labels) <= 6 and all({a, b} <= set(labels) for a, b in d.arrows)
            degree = {x: sum(a == x for a, _ in d.arrows) for x in labels}
            if layout == 'cycle': assert set(degree.values()) == {1}
            if layout == 'chain': assert len(d.arrows) == len(labels)-1
            if layout == 'shapes': assert not d.arrows
