"What `search` learned, kept in a file: the same sweep and the same model, without the text; nothing else is taken"
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from optiq.backends.open import open_backend
from optiq.material.tiny import tiny
from optiq.plan import uniform
from optiq.rounding import round_model, round_to_files
from optiq.sensitivity import kl_sweep

@pytest.fixture(scope='module')
def b(tmp_path_factory): return open_backend(tiny('qwen3', tmp_path_factory.mktemp('kept')/'m', shape=dict(num_hidden_layers=1)), 'torch')

TEXT = np.random.default_rng(0).integers(3, 200, (4, 24))

def swept(b, file=None, text=TEXT, **how):
    return kl_sweep(b, text[:2], ['4g64'], rounding_tokens=text, statistics=file, progress=False, method='exact', **how)

def test_a_sweep_and_a_model_are_the_same_without_the_text(b, tmp_path):
    file, fresh = tmp_path/'deep'/'kept.safetensors', swept(b)
    for s in (swept(b, file), swept(b, file)): # written, then read
        assert {k: v.tolist() for k, v in s.values.items()} == {k: v.tolist() for k, v in fresh.values.items()}
        assert s.header == fresh.header
    plan = uniform(b.checkpoint, 4)
    codes = [dict(round_model(b, learned, plan, 'search')) for learned in (TEXT, s.learned)]
    for p in codes[0]: assert (codes[0][p].dequantize() == codes[1][p].dequantize()).all(), p
    again = round_to_files(b, s.learned, plan, 'search', scratched := tmp_path, progress=True)
    assert again.keys() == codes[0].keys() and [*scratched.glob('*.safetensors')]

@pytest.mark.parametrize('text, how, said', [
    (TEXT+1, {}, 'text'), (TEXT[:, :20], {}, 'length'), (TEXT, dict(rounding='gptq'), 'gptq needs the text itself'),
    (TEXT, dict(rounding='minmax'), 'minmax learns from no text')])
def test_another_text_length_or_rounding_is_refused(b, tmp_path, text, how, said):
    swept(b, file := tmp_path/'kept.safetensors')
    before = file.read_bytes()
    with pytest.raises(ValueError, match=said): swept(b, file, text, **how)
    assert file.read_bytes() == before

def test_another_model_is_refused(b, tmp_path):
    swept(b, file := tmp_path/'kept.safetensors')
    other = open_backend(tiny('llama', tmp_path/'m', shape=dict(num_hidden_layers=1)), 'torch')
    with pytest.raises(ValueError, match='of something else: model'): swept(other, file)

@pytest.mark.parametrize('damage', [b'', b'{"optiq": "sweep"}', None])
def test_what_holds_no_statistics_is_refused(b, tmp_path, damage):
    swept(b, file := tmp_path/'kept.safetensors')
    if damage is None: save_file(load_file(file), file) # without the line that says what it is
    else: file.write_bytes(damage)
    with pytest.raises(ValueError, match='kept.safetensors') as e: swept(b, file)
    assert '\n' not in str(e.value)
