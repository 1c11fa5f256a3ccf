"mlx-lm's own HTTP server on models that make our caches: singles, a batch, and a prefix that it finds again"
import json
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
from mlx_lm import generate, load, server

from optiq.plan import uniform
from optiq.kv.cache import MixedKVCache, use_kv_config
from optiq.kv.config import kv_config
from optiq.kv.layout import kv_layout
from optiq.folder import _demo
from optiq.kv.rotated import TurboQuantKVCache, use_turbo_cache

def mixed(model):
    layout = kv_layout(model)
    return use_kv_config(model, kv_config(uniform(layout, 8), layout))

PROMPTS = ['Question: Tom has 3 boxes of 4 pens. How many pens?\nAnswer:', 'Question: A', 'The river was low that summer, so']

def ask(port, prompt, n=10):
    body = json.dumps(dict(model='default_model', prompt=prompt, max_tokens=n, temperature=0)).encode()
    r = urllib.request.Request(f'http://127.0.0.1:{port}/v1/completions', body, {'Content-Type': 'application/json'})
    with urllib.request.urlopen(r, timeout=120) as answer: return json.load(answer)

def serve(install, monkeypatch):
    "The server's own `main`, with caches put on the model that it loads; the server, its thread, and the caches that were made"
    made, loaded = [], server.load
    def load_and_install(*args, **options):
        model, *rest = loaded(*args, **options)
        model.set_dtype(mx.float32)
        make = install(model).make_cache
        model.make_cache = lambda: made.append(make()) or made[-1]
        return model, *rest
    monkeypatch.setattr(server, 'load', load_and_install)
    monkeypatch.setattr(sys, 'argv', ['server', '--model', str(_demo()), '--port', '0', '--log-level', 'ERROR'])
    started = []
    class Server(server.ThreadingHTTPServer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)
        def serve_forever(self):
            super().serve_forever()
            raise KeyboardInterrupt # as a user ends it
    monkeypatch.setattr(server._run_http_server, '__defaults__', (Server, server.APIHandler))
    thread = threading.Thread(target=server.main, daemon=True)
    thread.start()
    for _ in range(600):
        if started: return started[0], thread, made
        time.sleep(.1)
    raise TimeoutError('the server did not start')

@pytest.mark.parametrize('install, kind', [(mixed, MixedKVCache), (use_turbo_cache, TurboQuantKVCache)], ids=['mixed', 'rotated'])
def test_server(install, kind, monkeypatch):
    http, thread, made = serve(install, monkeypatch)
    try:
        port = http.server_address[1]
        model, tokenizer = load(str(_demo()))
        model.set_dtype(mx.float32)
        install(model)
        want = [generate(model, tokenizer, p, max_tokens=10) for p in PROMPTS]
        def texts(found): return [r['choices'][0]['text'] for r in found]
        assert texts(ask(port, p) for p in PROMPTS) == want
        assert made and {type(c) for c in made[-1]} == {kind}
        with ThreadPoolExecutor(3) as pool: assert texts(pool.map(lambda p: ask(port, p), PROMPTS)) == want
        again = ask(port, PROMPTS[0]+want[0])
        assert again['usage']['prompt_tokens_details']['cached_tokens'] > 0
    finally:
        http.shutdown()
        thread.join(30)
