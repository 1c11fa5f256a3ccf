"""The server's guard: who may ask, what may be asked, and a generation that outlives what fails

The server runs in this process and is asked over loopback; nothing here needs more than the _demo model.
"""
import json, random, socket, threading, time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPConnection
import pytest
from mlx_lm import server
from mlx_lm.models.cache import LRUPromptCache

from optiq.formats import parse_format
from optiq.plan import make_plan
from optiq.kv.config import kv_config
from optiq.kv.layout import kv_layout
from optiq.folder import _demo
from optiq.guard import _FIELDS, _LONGEST, _check_origin
from optiq.serve import _Generator, _Handler, _Provider, _Server, _names_of, serve

def arguments(**changes):
    "What mlx_lm.server makes of no options but ours"
    return Namespace(**dict(
        model=str(_demo()), adapter_path=None, draft_model=None, pipeline=False, trust_remote_code=False, chat_template='',
        use_default_chat_template=False, allowed_origins=[''], host='127.0.0.1', temp=0., top_p=1., top_k=0, min_p=0., max_tokens=2,
        chat_template_args={}, decode_concurrency=32, prompt_concurrency=8, prefill_step_size=2048, prompt_cache_size=10,
        prompt_cache_bytes=None, kv_bits=None, kv_group_size=64, quantized_kv_start=0, num_draft_tokens=3) | changes)

class Running:
    "A server on a free port, and requests to it"
    def __init__(self, config=None, **changes):
        self.generator = _Generator(_Provider(arguments(**changes), _names_of(['demo']), config), LRUPromptCache(10))
        make = partial(_Handler, self.generator, system_fingerprint='test')
        self.http = type('Ours', (_Server,), dict(generator=self.generator))(('127.0.0.1', 0), make)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.port = self.http.server_address[1]

    def send(self, body, path='/v1/completions', method='POST', headers={}):
        "(status, headers, what was answered)"
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        c = HTTPConnection('127.0.0.1', self.port, timeout=60)
        c.request(method, path, raw if method == 'POST' else None, {'Content-Type': 'application/json'} | headers)
        r = c.getresponse()
        return r.status, r.headers, r.read()

    def ask(self, prompt='A river', **more): return self.send(dict(model='demo', prompt=prompt, max_tokens=2) | more)
    @property
    def healthy(self): return self.send(b'', '/health', 'GET')[0] == 200

    def stop(self):
        self.http.shutdown()
        self.http.server_close()
        self.generator.stop_and_join()

@pytest.fixture(scope='module')
def running():
    found = Running()
    yield found
    found.stop()

@pytest.fixture
def fresh():
    "A server that a test may spoil"
    found = Running()
    yield found
    found.stop()

CHAT = '/v1/chat/completions'
def said(**message): return dict(messages=[dict(role='user') | message])
WRONG = [
    dict(prompt=''), dict(prompt=None), dict(), dict(prompt=['a', 'b']), dict(prompt=[1, 2]), dict(prompt=7), dict(prompt='\ud800'),
    *(dict(prompt='a', stop=s) for s in (5, '', [''], [5], [['a']], {}, ['a']*17)),
    *(dict(prompt='a', logit_bias=b) for b in ([5], {'5': 'x'}, {'-1': 1}, {'99999999': 1}, {'x': 1}, {'5': None}, {'5': 1e300})),
    *(dict(prompt='a', **{k: v}) for k, v in dict(
        max_tokens=0, temperature=-1, top_p=2, top_k=2**40, min_p='a', seed=-1, repetition_penalty=1e-9, stream='yes',
        repetition_context_size=2**70, top_logprobs=50, logprobs=1, stream_options=5, tools=5, chat_template_kwargs=[1]).items()),
    dict(prompt='a', top_k=10**6), dict(prompt='a', temperature=1e-30), dict(prompt='a', seed=2**64), dict(prompt='a', max_tokens=10**30),
    dict(prompt='a', stream=True, stream_options={}), dict(prompt='a', max_tokens='5'), dict(prompt='a', xtc_probability=7.),
    dict(prompt='a', temperature=1, xtc_probability=1., xtc_threshold=1.), dict(prompt='a', max_tokens=4096), dict(prompt='a', max_tokens=10**8),
    *(dict(prompt='a', **m) for m in (dict(n=2), dict(best_of=2), dict(echo=True), dict(suffix='x'), dict(logit_bias={'٣': 1}),
                                      dict(response_format=dict(type='json_object')))),
    b'', b'{', b'[]', b'"a"', b'\xff', b'{"prompt": "a", "top_p": NaN}', b'{"prompt": "a", "temperature": 1e400}',
    b'{"prompt": "a", "seed": -Infinity}', b'['*100_000, b'{"prompt": "a", "max_tokens": ' + b'9'*5000 + b'}']
WRONG_CHAT = [
    dict(), dict(messages=[]), dict(messages='hello'), dict(messages=['hello']), dict(messages=[None]), dict(messages=[{}]),
    said(content=5), said(content=['a']), said(content=[dict(type='text')]), said(content=[dict(type='image_url', image_url=5)]),
    said(content=[dict(type='image_url', image_url=dict(url='http://127.0.0.1:1/a.png'))]),
    said(content='a', tool_calls=5), said(content='a', tool_calls=[dict(function=dict(arguments=5))]),
    said(content='a') | dict(role_mapping=5), said(content='a') | dict(role_mapping=dict(user=5)), said(content='a') | dict(tools=[5]),
    said(content='a') | dict(chat_template_kwargs=dict(chat_template='{{ 7 }}')), dict(messages=[dict(content='a')])]

@pytest.mark.parametrize('i', range(len(WRONG)+len(WRONG_CHAT)))
def test_a_wrong_request_is_the_clients_fault(running, i):
    body, path = (WRONG[i], '/v1/completions') if i < len(WRONG) else (WRONG_CHAT[i-len(WRONG)], CHAT)
    status, _, answer = running.send(body, path)
    assert status == 400 and json.loads(answer)['error'] and b'Traceback' not in answer, (body, answer)
    assert running.healthy

def test_right_requests_are_answered(running):
    for more in (dict(), dict(stop='x'), dict(stop=['x', 'yz']), dict(logit_bias={'5': 3, '7': -1.5}), dict(seed=4), dict(top_k=5,
        temperature=.7),
                 dict(stream=True, stream_options=dict(include_usage=True)), dict(logprobs=True, top_logprobs=3), 
                 dict.fromkeys(['stop', 'seed', 'max_completion_tokens', 'temperature', 'top_p', 'top_k', 'stream', 'logprobs',
                     'model', 'num_draft_tokens', 'n', 'suffix', 'response_format']), dict(max_tokens=None), dict(max_tokens=4000, stop='e'),
                 dict(n=1, best_of=1, echo=False, suffix='', response_format=dict(type='text')),
                 dict(model='default_model'), dict(model=str(_demo().resolve()))):
        status, _, answer = running.ask(**more)
        assert status == 200, answer
    assert running.send(said(content=[dict(type='text', text='Hello')]) | dict(max_tokens=2), CHAT)[0] == 200
    models = json.loads(running.send(b'', '/v1/models', 'GET')[2])['data']
    assert [m['id'] for m in models] == ['demo', str(_demo().resolve())]
    assert [m['id'] for m in json.loads(running.send(b'', '/v1/models/demo', 'GET')[2])['data']] == ['demo']
    assert json.loads(running.send(b'', '/v1/models?x=1', 'GET')[2])['data'] == models
    for path in ('/v1/models/none', '/v1/modelsX'): assert running.send(b'', path, 'GET')[0] == 404

VALUES = [None, 0, -1, 5, 2**31, 2**63, 1.5, -.1, 1e-300, '', 'a', '\0', '\u200b', [], ['a'], [[]], [None], {}, {'a': 1}, {'0': 1}, True, False]
NAMES = ['prompt', 'messages', 'stop', 'logit_bias', 'temperature', 'top_p', 'top_k', 'min_p', 'seed', 'stream', 'logprobs', 'top_logprobs',
         'repetition_penalty', 'repetition_context_size', 'presence_penalty', 'frequency_penalty', 'xtc_probability', 'xtc_threshold', 'tools',
         'stream_options', 'role_mapping', 'chat_template_kwargs', 'model', 'adapters', 'draft_model', 'num_draft_tokens', 'n', 'user']

def test_no_request_ends_the_generation(running):
    "Fields that are nothing in particular, two at a time"
    r, seen = random.Random(0), set()
    for _ in range(120):
        path = r.choice(['/v1/completions', CHAT])
        body = dict(model='demo', prompt='A', messages=[dict(role='user', content='A')], max_tokens=1)
        status = running.send(body | {r.choice(NAMES): r.choice(VALUES) for _ in range(2)}, path)[0]
        assert status in (200, 400, 404)
        seen.add(status)
    assert seen == {200, 400, 404} and running.ask()[0] == 200 and running.healthy and not running.generator.failure

@pytest.mark.parametrize('field, name', [('model', '/etc'), ('model', 'Qwen/Qwen3-0.6B'), ('model', '..'), ('draft_model', 'demo'),
    ('adapters', '/tmp')])
def test_only_what_was_named_can_be_asked_for(running, field, name, monkeypatch):
    monkeypatch.setattr(server, 'load', None) # nothing is loaded
    status, _, answer = running.ask(**{field: name})
    assert status == 404 and name in json.loads(answer)['error']

def test_models_that_were_named_beside_the_first(tmp_path, monkeypatch):
    import shutil
    second = shutil.copytree(_demo(), tmp_path/'second')
    p = _Provider(arguments(), _names_of(['demo', second]))
    assert [*p.names] == ['demo', str(_demo().resolve()), str(second)]
    p.load(str(second))
    assert p.model_key[0] == str(second) and p.vocabulary
    with pytest.raises(ValueError, match='names a second model'): _Provider(arguments(model=str(second)), _names_of(['demo']))

ORIGINS = [ # page, Host that was asked, allowed origins, may it
    (None, 'localhost:1', [''], True), ('http://localhost:3000', 'localhost:8080', [''], True), ('http://127.0.0.1', '127.0.0.1:8080', [''],
        True),
    ('http://[::1]:4', '[::1]:8080', [''], True), ('http://evil.example', 'localhost:8080', [''], False), ('null', 'localhost:8080', [''],
        False),
    ('http://evil.example:8080', 'evil.example:8080', [''], False), # a name that was made to resolve to this host
    ('http://my.host', 'my.host:8080', [''], True), ('http://evil.example', 'localhost:8080', ['https://good.example'], False),
    ('https://good.example', 'localhost:8080', ['https://good.example'], True), ('http://evil.example', 'localhost:8080', ['*'], True),
    ('http://localhost.evil.example', 'localhost:8080', [''], False), ('http://127.0.0.1', 'localhost:8080', [''], False), ('', 'localhost',
        ['x'], False)]

@pytest.mark.parametrize('origin, host, allowed, may', ORIGINS)
def test_origins(origin, host, allowed, may):
    headers = dict(Host=host) | ({} if origin is None else dict(Origin=origin))
    args = Namespace(allowed_origins=allowed, host='my.host')
    if may: return _check_origin(headers, args)
    with pytest.raises(ValueError, match='--allowed-origins'): _check_origin(headers, args)

def test_pages_of_other_sites_may_not_ask(running):
    good, evil = dict(Origin=f'http://127.0.0.1:{running.port+1}'), dict(Origin='http://evil.example')
    status, headers, _ = running.send(dict(prompt='A', max_tokens=1), headers=good)
    assert status == 200 and headers['Access-Control-Allow-Origin'] == good['Origin']
    for method, path in (('POST', '/v1/completions'), ('GET', '/v1/models'), ('OPTIONS', '/v1/completions')):
        status, headers, answer = running.send(dict(prompt='A', max_tokens=1), path, method, evil)
        assert 'Access-Control-Allow-Origin' not in headers and (status == 403 or method == 'OPTIONS' and not answer)
    for kind in ('text/plain', 'application/x-www-form-urlencoded', 'multipart/form-data', ''):
        assert running.send(dict(prompt='A'), headers={'Content-Type': kind})[0] == 415

@pytest.mark.parametrize('method, path', [('POST', '/v1/completions'), ('GET', '/v1/models'), ('OPTIONS', '/v1/completions')])
@pytest.mark.parametrize('headers', [dict(Host='[::1'), dict(Origin='http://[bad')])
def test_an_address_that_is_none(running, method, path, headers):
    status, _, answer = running.send(dict(prompt='A', max_tokens=1), path, method, headers)
    assert status == 400 and 'is not a URL' in json.loads(answer)['error']

def draws(running, **more): return running.ask(temperature=1, **more)[0]

@pytest.mark.parametrize('single', [dict(), dict(seed=1)])
def test_what_the_sampler_refuses_spoils_no_other(running, monkeypatch, single):
    monkeypatch.setitem(_FIELDS, 'xtc_threshold', (lambda x: True, '')) # the sampler has to refuse it
    assert draws(running, xtc_probability=1., xtc_threshold=1., **single) == 400
    assert draws(running) == draws(running, **single) == 200

def ends(running, within=10):
    "Whether nothing is generated any more, soon: a single request waits for one before it"
    start = time.time()
    assert running.ask(seed=3)[0] == 200
    return time.time()-start < within

@pytest.mark.parametrize('single', [dict(), dict(seed=1)])
def test_a_client_that_hangs_up_is_not_written_for(running, monkeypatch, single):
    monkeypatch.setattr(running.generator.model_provider, 'context', 10**9)
    raw = json.dumps(dict(prompt='a', max_tokens=10**8, logit_bias={'5': 1000}, **single)).encode()
    with socket.create_connection(('127.0.0.1', running.port)) as s:
        s.sendall(b'POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n' % len(raw)+raw)
        time.sleep(.5)
    assert ends(running)

def test_no_end_of_text_stands_before_the_answer(running, monkeypatch):
    tokenizer, seen = running.generator.model_provider.tokenizer, []
    plain, end = tokenizer._tokenizer.encode, tokenizer._tokenizer.eos_token_id
    monkeypatch.setattr(tokenizer._tokenizer, 'encode', lambda *a, **k: plain(*a, **k)+[end])
    ours = _Generator._tokenize
    monkeypatch.setattr(_Generator, '_tokenize', lambda *a: seen.append(ours(*a)) or seen[-1])
    assert running.ask('A river')[0] == 200
    assert seen[0][0] == plain('A river')

def test_a_request_has_a_length(running):
    for length, status in ((_LONGEST+1, 413), ('9'*5000, 413), (-1, 400), ('x', 400)):
        with socket.create_connection(('127.0.0.1', running.port), timeout=20) as s:
            s.sendall(f'POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n'.encode())
            assert s.recv(4096).split()[1] == str(status).encode() # at once: nothing is read first
    assert running.healthy

def breaks(monkeypatch, times=1):
    "Let the next batches fail, as if memory ran out"
    left, step = [times], server.BatchGenerator.next
    def fails(self):
        if not left[0]: return step(self)
        left[0] -= 1
        raise MemoryError('no room')
    monkeypatch.setattr(server.BatchGenerator, 'next', fails)

@pytest.mark.parametrize('stream', [False, True])
def test_a_generation_that_dies_is_told_and_begins_again(fresh, monkeypatch, caplog, stream):
    assert fresh.ask()[0] == 200
    breaks(monkeypatch)
    status, _, answer = fresh.ask(prompt='Another', stream=stream)
    assert b'no room' in answer and (status == 500 or stream and answer.startswith(b'data: {"error"'))
    assert 'generation failed: MemoryError: no room' in caplog.text
    assert fresh.healthy and fresh.ask()[0] == 200

def test_all_who_wait_are_told(fresh, monkeypatch):
    assert fresh.ask()[0] == 200
    breaks(monkeypatch)
    with ThreadPoolExecutor(6) as pool: found = [*pool.map(lambda i: fresh.ask(f'Number {i}')[0], range(6))]
    assert set(found) <= {200, 500} and 500 in found and fresh.ask()[0] == 200

@pytest.mark.parametrize('at', ['load', 'idle'])
def test_a_server_that_cannot_generate_ends_with_a_line(at, monkeypatch):
    def fails(*_, **__): raise ValueError('a damaged\nmodel')
    if at == 'load': monkeypatch.setattr(server, 'load', fails)
    else: monkeypatch.setattr(_Generator, '_generate', fails)
    start = time.time()
    with pytest.raises(RuntimeError, match='nothing can be generated any more: ValueError: a damaged'):
        serve('demo', options=['--port', '0', '--log-level', 'CRITICAL'])
    assert time.time()-start < 60

def test_a_port_that_is_taken_ends_it():
    with socket.create_server(('127.0.0.1', 0)) as s, pytest.raises(OSError):
        serve('demo', options=['--port', str(s.getsockname()[1]), '--log-level', 'CRITICAL'])

def test_many_clients_at_once_on_a_fresh_server():
    "With a rotated cache that has no statistics"
    layout = kv_layout('demo')
    running = Running(kv_config(make_plan(layout, {u.path: parse_format('tq4') for u in layout.units}), layout))
    def ask(words): return running.send(dict(prompt=words, max_tokens=2))
    words = [f'A river, {i % 5} and {i}' for i in range(16)]
    try:
        for turn in range(2): # in the second one caches of the store meet new ones
            with ThreadPoolExecutor(16) as pool: found = [*pool.map(ask, words)]
            assert [f[0] for f in found] == [200]*16, {f[2] for f in found if f[0] != 200}
            answers = [json.loads(f[2]) for f in found]
            words = [w+a['choices'][0]['text']+' and so on' if i % 2 else f'{i}' for i, (w, a) in enumerate(zip(words, answers))]
        assert any(a['usage'].get('prompt_tokens_details', {}).get('cached_tokens') for a in answers)
        assert running.healthy and not running.generator.failure
    finally: running.stop()
