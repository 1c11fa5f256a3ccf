"Wishes that nobody would fulfil are refused in one line, before any work, with nothing left on the disk"
import os

import pytest
from click.testing import CliRunner

from optiq.cli import main
from optiq.material.tiny import tiny
from test_refine import made_up
from optiq.formats import Format
from optiq.models import Checkpoint

PARTS = dict(qwen3_vl='vision-language', qwen3_asr='speech', qwen3_5='vision-language')

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp('models')
    for a in (*PARTS, 'llama', 'qwen3'): tiny(a, folder/a)
    return folder

def refused(folder, monkeypatch, *words):
    monkeypatch.chdir(folder)
    r = CliRunner().invoke(main, [str(w) for w in words])
    assert r.exit_code == 1 and r.stderr.startswith('error: ') and r.stderr.count('\n') == 1, r.output
    assert not os.listdir(folder)
    return r.stderr

@pytest.mark.parametrize('architecture', PARTS)
def test_caches_of_models_of_several_parts(models, tmp_path, monkeypatch, architecture):
    said = refused(tmp_path, monkeypatch, 'convert', models/architecture, '--kv', '--target-size', 3)
    assert f'{architecture} is a {PARTS[architecture]} model, whose weights and cache cannot share a budget yet' in said
    said = refused(tmp_path, monkeypatch, 'kv-cache', models/architecture, '--seq-len', 32)
    assert '--seq-len has no effect' in said

def test_a_cache_in_a_form_of_its_own(tmp_path, monkeypatch):
    tiny('whisper', tmp_path/'m')
    (tmp_path/'here').mkdir()
    said = refused(tmp_path/'here', monkeypatch, 'kv-cache', tmp_path/'m')
    assert 'whisper keeps its cache in a form of its own' in said

def test_a_hybrid_s_recurrent_layers_stay_as_they_are(models, tmp_path):
    r = CliRunner().invoke(main, ['kv-cache', str(models/'qwen3_5'), '--model-type', 'llm', '-o', str(tmp_path/'kv'), '--n-calibration', '1',
                                  '--seq-len', '32', '--n-evaluation', '1', '--context', '64'])
    assert r.exit_code == 0, r.output
    assert r.stdout.count('recurrent state') == 3

@pytest.mark.parametrize('command', [['sweep', '-o', 's.jsonl'], ['convert'], ['pareto']])
@pytest.mark.parametrize('architecture', ['qwen3_vl', 'qwen3_asr'])
def test_a_length_of_pictures(models, tmp_path, monkeypatch, architecture, command):
    assert 'seq-len' in refused(tmp_path, monkeypatch, command[0], models/architecture, *command[1:], '--seq-len', 32)

@pytest.mark.parametrize('command', [['sweep', '-o', 's.jsonl'], ['convert'], ['pareto']])
def test_rounding_learns_from_what_is_measured_on(models, tmp_path, monkeypatch, command):
    words = [command[0], models/'llama', *command[1:], '--rounding-samples', 2, '--n-calibration', 4]
    assert 'cannot learn from 2 sequences' in refused(tmp_path, monkeypatch, *words)

def test_the_curve_of_another_model(models, tmp_path, monkeypatch):
    made_up(Checkpoint(models/'llama'), [Format(4), Format(8)]).save(models/'s.json')
    assert 'was measured on another model' in refused(tmp_path, monkeypatch, 'pareto', models/'qwen3', '--sweep', models/'s.json')
    assert CliRunner().invoke(main, ['pareto', str(models/'llama'), '--sweep', str(models/'s.json')]).exit_code == 0
