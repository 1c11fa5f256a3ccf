"The server, asked by OpenAI's own client over loopback"
import json, shutil, socket, time
from concurrent.futures import ThreadPoolExecutor
from urllib.error import URLError
from urllib.request import Request, urlopen
import pytest
from click.testing import CliRunner
from apart import Apart
from optiq.cli import main
from optiq.formats import parse_format
from optiq.plan import make_plan, uniform
from optiq.kv.cache import generate_with_mixed_kv
from optiq.kv.config import kv_config, save_kv_config
from optiq.kv.layout import kv_layout
from optiq.folder import find_model
from optiq.serve import _find_config
from optiq.material.problems import word_problems

openai = pytest.importorskip('openai')
prompts = [r['prompt'] for r in word_problems(8, 'test')[4:7]]

@pytest.fixture(scope='module')
def config(tmp_path_factory):
    layout, bits = kv_layout('demo'), dict(keys='2g64', values='2g64')
    path = tmp_path_factory.mktemp('kv')/'kv_config.json'
    save_kv_config(kv_config(make_plan(layout, {u.path: parse_format(bits[u.kind]) for u in layout.units}), layout), path)
    return path

@pytest.fixture(scope='module')
def client(config):
    "A client of a server that serves the demo model with 2-bit keys and values"
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    server = Apart('-m', 'optiq.cli', 'serve', 'demo', '--kv-config', config, '--port', port, '--log-level', 'ERROR')
    try:
        for _ in range(1200):
            if server.poll() is not None: pytest.fail(server.stderr)
            try: urlopen(f'http://127.0.0.1:{port}/health')
            except URLError: time.sleep(.1)
            else: break
        yield openai.OpenAI(base_url=f'http://127.0.0.1:{port}/v1', api_key='none', max_retries=0)
    finally:
        server.terminate()
        server.wait(10)

@pytest.fixture(scope='module')
def expected(config):
    "What the same caches, and the model's own, write in Python"
    from mlx_lm import generate, load
    model, tokenizer = load(str(find_model('demo')))
    mixed = [generate_with_mixed_kv(model, tokenizer, p, kv_config=config, max_tokens=60) for p in prompts]
    return mixed, [generate(model, tokenizer, p, max_tokens=60) for p in prompts]

def ask(client, prompt): return client.completions.create(model='demo', prompt=prompt, max_tokens=60).choices[0].text

def test_the_served_caches_are_the_configured_ones(client, expected):
    mixed, plain = expected
    assert mixed != plain
    assert ask(client, prompts[0]).strip() == mixed[0].strip()
    assert ask(client, prompts[0]).strip() == mixed[0].strip() # the prompt is in the store of caches now

def test_streaming(client, expected):
    stream = client.completions.create(model='default_model', prompt=prompts[1], max_tokens=60, stream=True)
    pieces = [c.choices[0].text for c in stream]
    assert len(pieces) > 5 and ''.join(pieces).strip() == expected[0][1].strip()

def test_requests_at_the_same_time(client, expected):
    with ThreadPoolExecutor(3) as pool: texts = list(pool.map(lambda p: ask(client, p), prompts))
    assert [t.strip() for t in texts] == [t.strip() for t in expected[0]]

def test_chat_streams_what_it_says_at_once(client):
    talk = dict(model='demo', messages=[dict(role='user', content=prompts[0])], max_tokens=40)
    whole = client.chat.completions.create(**talk).choices[0].message.content
    pieces = [c.choices[0].delta.content or '' for c in client.chat.completions.create(**talk, stream=True) if c.choices]
    assert whole and len(pieces) > 5 and ''.join(pieces) == whole

def test_models_are_listed(client):
    assert str(find_model('demo').resolve()) in [m.id for m in client.models.list()]

def test_a_config_beside_the_weights_is_found(tmp_path, config):
    folder = find_model('demo')
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    assert _find_config(tmp_path) is None
    (tmp_path/'kv_config.json').write_text(config.read_text())
    assert _find_config(tmp_path) == tmp_path/'kv_config.json'

def refused(*line):
    r = CliRunner().invoke(main, ['serve', *map(str, line)])
    assert r.exit_code == 1 and r.stderr.startswith('error: ') and r.stderr.count('\n') == 1
    return r.stderr

def test_what_cannot_work_is_refused_at_the_start(tmp_path, config):
    assert 'optiq kv-cache' in refused('demo', '--kv-config', tmp_path/'none.json')
    assert '--kv-bits' in refused('demo', '--kv-config', config, '--kv-bits', 4)
    layout, other = kv_layout('demo'), tmp_path/'other.json'
    c = kv_config(uniform(layout, '4g64'), layout)
    save_kv_config(c | dict(layers=c['layers'][:-1]), other)
    assert '9 layers' in refused('demo', '--kv-config', other)

@pytest.mark.parametrize('single', [{}, dict(seed=1)])
def test_a_server_that_is_stopped_while_it_writes_ends_as_other_commands(single):
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    server = Apart('-m', 'optiq.cli', 'serve', 'demo', '--port', port, '--log-level', 'ERROR')
    try:
        for _ in range(1200):
            try: urlopen(f'http://127.0.0.1:{port}/health')
            except URLError: time.sleep(.1)
            else: break
        body = json.dumps(dict(prompt='a', max_tokens=4000, logit_bias={'5': 1000}, stream=True, **single)).encode()
        urlopen(Request(f'http://127.0.0.1:{port}/v1/completions', body, {'Content-Type': 'application/json'})).readline()
        server.terminate()
        assert server.wait(20) == 128+15 and server.stderr.splitlines()[-1].startswith('interrupted;')
    finally: server.kill()
