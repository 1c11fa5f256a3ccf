"Publishing, without a network: what is listed is what is sent, and nothing without a token"
import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from optiq.cli import main
from optiq.convert import convert
from optiq.material.tiny import tiny
from optiq.models import Checkpoint
from optiq.plan import uniform
from optiq.show.upload import _files_to_send, _header_of, upload

class Api:
    "A Hub that remembers what it was told"
    def __init__(self, token='secret', card=None): self.token, self.card, self.calls = token, card, []
    def model_info(self, name):
        self.calls.append(('model_info', name))
        if self.card is None: raise OSError('no network')
        return SimpleNamespace(card_data=self.card)
    def create_repo(self, repo, **how): self.calls.append(('create_repo', repo, how))
    def create_commit(self, repo, parts, commit_message):
        self.calls.append(('create_commit', repo, {p.path_in_repo: p.path_or_fileobj for p in parts}))
        return SimpleNamespace(commit_url=f'https://hub/{repo}')

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp('upload')
    c = Checkpoint(tiny('qwen3', place/'m', shape=dict(num_hidden_layers=1)))
    convert(c, uniform(c, 4), place/'small')
    return place/'small'

def test_what_is_listed_is_what_is_sent(folder):
    api, shown = Api(), []
    (folder/'.secret').write_text('x')
    (folder/'notes.md').write_text('x')
    (folder/'link.json').symlink_to(folder/'config.json')
    u = upload(folder, 'me/small', show=shown.append, api=api)
    (kind, *_), (_, repo, sent) = api.calls
    assert kind == 'create_repo' and repo == 'me/small' and u.sent == 'https://hub/me/small' and {*sent} == {*u.files}
    assert all(f'{n:,}  {name}' in shown[0] for name, n in u.files.items()) and 'sent:' not in shown[0]
    assert {'model.safetensors', 'config.json', 'optiq/plan.json', 'README.md', 'optiq/plan.svg'} <= {*sent}
    assert not {'.secret', 'notes.md', 'link.json', '.optiq'} & {*sent} and _files_to_send(folder).keys() < sent.keys()
    assert sent['README.md'].decode() == u.card and len(sent['README.md']) == u.files['README.md']

@pytest.mark.parametrize('send, token', [(False, 'secret'), (None, None), (False, None)])
def test_a_dry_run_sends_nothing(folder, send, token):
    api = Api(token)
    u = upload(folder, 'me/small', send, api=api, show=pytest.fail)
    assert not [c for c in api.calls if c[0].startswith('create')] and u.sent is None and 'nothing was sent' in repr(u)

def test_without_a_token_asking_is_an_error(folder):
    with pytest.raises(ValueError, match='sending needs a token; log in with'): upload(folder, 'me/small', True, api=Api(None))

@pytest.mark.parametrize('repo', ['small', 'a/b/c', '../x', 'me/'])
def test_what_is_no_place(folder, repo):
    with pytest.raises(ValueError, match='is not a name on the Hub'): upload(folder, repo, api=Api())

def header(card): return dict(line.split(': ', 1) for line in card.split('---\n')[1].splitlines())

def test_the_card_has_what_the_filters_know(folder, monkeypatch):
    file = folder/'optiq'/'plan.json'
    text = file.read_text()
    d = json.loads(text)
    monkeypatch.setattr('optiq.show.upload.Plan', SimpleNamespace(load=lambda f: plan))
    from optiq.plan import Plan
    plan = Plan.load(file)
    plan.model = 'Qwen/Qwen3-0.6B'
    u = upload(folder, 'me/small', False, api=Api(card=dict(license='apache-2.0', license_link='https://x', tags=['y'])))
    found = {k: json.loads(v) for k, v in header(u.card).items()}
    assert found == dict(library_name='mlx', pipeline_tag='text-generation', license='apache-2.0', license_link='https://x',
                         base_model='Qwen/Qwen3-0.6B', base_model_relation='quantized', tags=['mlx', 'optiq', 'mixed-precision', '4-bit'])
    assert d['model'] not in u.card and 'load("me/small")' in u.card and '| 4g64 | ' in u.card and 'optiq/plan.svg' in u.card
    u = upload(folder, 'me/small', False, api=Api())
    assert 'license' not in header(u.card) and 'licence: none found' in repr(u)

def test_the_licence_of_a_local_source(folder):
    (folder.parent/'m'/'README.md').write_text('---\nlicense: "mit" \nbase_model: org/base\ntags:\n- x\n---\nlicense: gpl\n')
    u = upload(folder, 'me/small', False, api=Api())
    assert u.source == dict(license='mit', base_model='org/base') and _header_of('license: mit') == {}

def test_what_was_not_converted(tmp_path):
    with pytest.raises(FileNotFoundError, match='no optiq/plan.json; give a folder that was converted'): upload(tmp_path, 'me/x', api=Api())

def test_the_command(folder, monkeypatch):
    monkeypatch.delenv('HF_TOKEN', raising=False)
    monkeypatch.setattr('huggingface_hub.get_token', lambda: None)
    r = CliRunner().invoke(main, ['upload', str(folder), 'me/small'])
    assert r.exit_code == 0 and 'nothing was sent: there is no token; log in with: hf auth login' in r.output
    r = CliRunner().invoke(main, ['upload', str(folder), 'me/small', '--send'])
    assert r.exit_code == 1 and 'log in' in r.output

def test_no_place_on_this_machine_is_published(folder, tmp_path):
    plan = json.loads((folder/'optiq'/'plan.json').read_text())
    assert str(folder.parent) in plan['model']
    (folder/'optiq'/'sweep.json').write_text(json.dumps(dict(model=plan['model'], calibration='bundled:0.5,notes/mine.jsonl:0.5',
                                                             learned=dict(source='~/texts/a.txt, 8 × 128 tokens'))))
    api, before = Api(), (folder/'optiq'/'plan.json').read_bytes()
    try: u = upload(folder, 'me/small', show=lambda text: None, api=api)
    finally: (folder/'optiq'/'sweep.json').unlink()
    sent = api.calls[-1][-1]
    assert json.loads(sent['optiq/plan.json']) == plan | dict(model='m') and (folder/'optiq'/'plan.json').read_bytes() == before
    assert json.loads(sent['optiq/sweep.json']) == dict(model='m', calibration='bundled:0.5,mine.jsonl:0.5',
                                                        learned=dict(source='a.txt, 8 × 128 tokens'))
    assert all(u.files[k] == len(v) for k, v in sent.items() if isinstance(v, bytes))
