"`optiq doctor`, and colour in the terminal"
import json
import pytest
from click.testing import CliRunner
from huggingface_hub import constants
from optiq.cli import main
from optiq.show import doctor

@pytest.fixture(autouse=True)
def no_hub(monkeypatch): monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')

def finding(found, name): return next(f for f in found if f.name == name)

def test_json_names_what_to_do():
    r = CliRunner().invoke(main, ['doctor', '--json'])
    d = json.loads(r.stdout)
    assert r.exit_code == 0 and d['ok']
    assert {'python', 'mlx', 'backend', 'chip', 'MLX matmul', 'memory', 'disk', 'hub'} <= {f['name'] for f in d['findings']}
    assert all(f['remedy'] for f in d['findings'] if f['state'] != 'ok')

def test_what_is_missing(monkeypatch):
    monkeypatch.setattr(doctor, '_installed', lambda name: None if name in ('torch', 'mlx-lm') else '1.0')
    found = doctor._Diagnosis(doctor._versions())
    assert finding(found, 'torch').state == 'note' and 'optiq-mlx[convert]' in finding(found, 'torch').remedy
    assert finding(found, 'mlx-lm').state == 'bad' and not found.ok
    assert '✗' in found._repr_html_()

def test_exit_status_tells_what_is_broken(monkeypatch):
    monkeypatch.setattr(doctor, 'doctor', lambda timeout: doctor._Diagnosis([doctor._Finding('mlx', 'missing', 'bad', 'install it')]))
    assert CliRunner().invoke(main, ['doctor']).exit_code == 1

def test_hub_is_left_alone_when_offline(monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert doctor._hub().value.startswith('not asked')

def test_hub_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.delenv('HF_HUB_OFFLINE', raising=False)
    assert doctor._hub(2).state == 'note' and 'HF_ENDPOINT' in doctor._hub(2).remedy

def test_hub_that_answers(monkeypatch):
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread
    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self): self.send_response(404); self.end_headers()
        def log_message(self, *_): pass
    server = HTTPServer(('127.0.0.1', 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'ENDPOINT', f'http://127.0.0.1:{server.server_port}')
    monkeypatch.delenv('HF_HUB_OFFLINE', raising=False)
    assert doctor._hub().state == 'ok'
    server.shutdown()

@pytest.mark.parametrize('line', [['doctor'], ['convert', 'no-such-model']])
def test_colour_on_a_terminal_only(line, monkeypatch):
    monkeypatch.delenv('NO_COLOR', raising=False)
    def output(**how):
        r = CliRunner().invoke(main, line, **how)
        return r.stdout+r.stderr
    assert '\x1b[' in output(color=True) # a terminal
    assert '\x1b[' not in output() # a file or a pipe
    assert '\x1b[' not in output(color=True, env=dict(NO_COLOR='1'))

def test_lines_fit_a_terminal():
    r = CliRunner().invoke(main, ['doctor'])
    assert max(map(len, r.stdout.splitlines())) <= 80

@pytest.mark.parametrize('name', main.commands)
def test_help_has_an_example(name):
    text = CliRunner().invoke(main, [name, '--help']).stdout
    assert f'  optiq {name} ' in text or f'  optiq {name}\n' in text

@pytest.mark.parametrize('shell', ['bash', 'zsh', 'fish'])
def test_shell_completion(shell):
    r = CliRunner().invoke(main, [], env=dict(_OPTIQ_COMPLETE=f'{shell}_source'), prog_name='optiq')
    assert r.exit_code == 0 and '_OPTIQ_COMPLETE' in r.stdout

def test_completion_knows_commands():
    r = CliRunner().invoke(main, [], env=dict(_OPTIQ_COMPLETE='bash_complete', COMP_WORDS='optiq co', COMP_CWORD='1'), prog_name='optiq')
    assert 'plain,convert' in r.stdout
