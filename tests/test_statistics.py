"What `search` learned, kept in a file: the same sweep and the same model, without the text; nothing else is taken"
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from optiq.backends.open import open_backend
from optiq.material.tiny import tiny
from optiq.pipeline import optimize
from optiq.plan import uniform
from optiq.request import Caps, Texts, Weights
from optiq.rounding import round_model, round_to_files
from optiq.sensitivity import kl_sweep

@pytest.fixture(scope='module')
def b(tmp_path_factory): return open_backend(tiny('qwen3', tmp_path_factory.mktemp('kept')/'m', shape=dict(num_hidden_layers=1)), 'torch')

TEXT = np.random.default_rng(0).integers(3, 200, (4, 24))

def swept(b, file=None, text=TEXT, fmt='4g64', **how):
    return kl_sweep(b, text[:2], [fmt], rounding_tokens=text, statistics=file, progress=False, method='exact', **how)

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

@pytest.mark.parametrize('damage', [b'', b'{"optiq": "sweep"}', None, -1])
def test_what_holds_no_statistics_is_refused(b, tmp_path, damage):
    swept(b, file := tmp_path/'kept.safetensors')
    if damage is None: save_file(load_file(file), file) # without the line that says what it is
    else: file.write_bytes(file.read_bytes()[:-1] if damage == -1 else damage)
    with pytest.raises(ValueError, match='kept.safetensors') as e: swept(b, file)
    assert '\n' not in str(e.value)

KEY = 'model.layers.0.mlp.down_proj'

@pytest.mark.parametrize('change', [
    lambda a: a[f'{KEY}.squares'].put(3, np.nan), lambda a: a[f'{KEY}.squares'].put(3, -1.), lambda a: a.pop(f'{KEY}.count'),
    lambda a: a[f'{KEY}.count'].put(0, -1), lambda a: a.update({f'{KEY}.squares': a[f'{KEY}.squares'][:-1]}),
    lambda a: a.update({f'{KEY}.squares': a[f'{KEY}.squares'].astype(np.float16)})])
def test_damaged_numbers_are_refused_by_name(b, tmp_path, change):
    from safetensors import safe_open
    swept(b, file := tmp_path/'kept.safetensors')
    with safe_open(file, 'numpy') as f: said = f.metadata()
    change(arrays := load_file(file))
    save_file(arrays, file, said)
    with pytest.raises(ValueError, match=f'kept.safetensors .*{KEY}'): swept(b, file)

def test_places_that_are_not_ours(b, tmp_path):
    thesis, beside = tmp_path/'thesis.txt', tmp_path/'new.safetensors.part'
    for f in (thesis, beside): f.write_text('mine')
    with pytest.raises(ValueError, match='thesis.txt holds no statistics'): swept(b, thesis)
    with pytest.raises(ValueError, match='is the source'): swept(b, b.checkpoint.folder/'model-kept.safetensors')
    with pytest.raises(ValueError, match='is the output'): swept(b, tmp_path/'s.jsonl', out=tmp_path/'s.jsonl')
    with pytest.raises(ValueError, match='`statistics` .* inside'):
        optimize(str(b.checkpoint.folder), tmp_path/'out', weights=Weights(statistics=tmp_path/'out'/'kept.safetensors'))
    swept(b, tmp_path/'new.safetensors')
    assert thesis.read_text() == beside.read_text() == 'mine' and not (tmp_path/'out').exists()
    assert sorted(f.name for f in tmp_path.iterdir()) == ['new.safetensors', 'new.safetensors.part', 'thesis.txt']

@pytest.mark.parametrize('end', [KeyboardInterrupt(), OSError(28, 'No space left on device')])
def test_an_end_while_it_is_written_leaves_nothing(b, tmp_path, monkeypatch, end):
    import safetensors.numpy
    def save(arrays, file, **more):
        Path(file).write_bytes(b'half')
        raise end
    monkeypatch.setattr(safetensors.numpy, 'save_file', save)
    with pytest.raises((KeyboardInterrupt, OSError)): swept(b, tmp_path/'kept.safetensors')
    assert not [*tmp_path.iterdir()]

def test_a_sweep_says_if_it_learned_from_another_text(b, tmp_path):
    "Nothing is heard, and nothing written, that its model would refuse afterwards"
    sweep = swept(b)
    how = dict(weights=Weights(sweep=sweep, statistics=tmp_path/'kept.safetensors'), caps=Caps(target_bpw=4))
    with pytest.raises(ValueError, match='not what the sweep learned from'):
        optimize(str(b.checkpoint.folder), texts=Texts(n_calibration=2, seq_len=24, n_evaluation=1, eval_len=24), backend='torch', **how)
    assert not [*tmp_path.iterdir()]

@pytest.mark.parametrize('family', ['gemma4_text', 'nanbeige', 'deepseek_v32'])
def test_weights_are_heard_on_the_model_itself(tmp_path, monkeypatch, family):
    "Also where the model is no chain, so that rounding runs it while blocks are replayed, and where heads have matrices"
    monkeypatch.syspath_prepend(Path(__file__).parents[1]/'bench')
    import families
    config, told = families.config_of('mlx-lm', family, families.read_table())
    families.write_checkpoint(tmp_path/'m', config, told, 'mlx', False)
    b = open_backend(str(tmp_path/'m'), 'mlx')
    fresh, kept = swept(b, fmt='4g32'), swept(b, tmp_path/'kept.safetensors', fmt='4g32') # the latter heard all before it began
    assert {k: v.tolist() for k, v in kept.values.items()} == {k: v.tolist() for k, v in fresh.values.items()}
