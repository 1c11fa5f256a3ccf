"Chromium without a window, driven over its own debugging protocol, and JupyterLab to look at"
import base64, json, os, shutil, socket, subprocess, sys, time
from contextlib import contextmanager
from urllib.request import urlopen

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
FLAGS = ('--headless=new --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync '
         '--no-first-run --remote-debugging-port=0 --remote-allow-origins=* --hide-scrollbars').split()

def until(f, seconds=60, what=''):
    "What `f` returns, once it returns something"
    end = time.time()+seconds
    while time.time() < end:
        try: found = f()
        except (OSError, AssertionError): found = None
        if found: return found
        time.sleep(.1)
    raise AssertionError(f'not within {seconds} s: {what or f}')

class Page:
    "One page of a browser"
    def __init__(self, address):
        from websocket import create_connection
        self.socket, self.n = create_connection(address, timeout=60, suppress_origin=True), 0

    def send(self, method, **params):
        self.n += 1
        self.socket.send(json.dumps(dict(id=self.n, method=method, params=params)))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get('id') != self.n: continue
            assert 'error' not in answer, answer
            return answer['result']

    def js(self, code):
        "The value of an expression"
        r = self.send('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in r, r['exceptionDetails'].get('exception', r)
        return r['result'].get('value')

    def mouse(self, kind, x, y): self.send('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', buttons=1, clickCount=1)
    def middle(self, selector):
        return self.js(f'(r => [r.x+r.width/2, r.y+r.height/2])(document.querySelector({selector!r}).getBoundingClientRect())')
    def drag(self, selector, dx, steps=12):
        "Take something and move it to the right"
        x, y = self.middle(selector)
        self.mouse('mousePressed', x, y)
        for k in range(1, steps+1):
            self.mouse('mouseMoved', x+dx*k/steps, y)
            time.sleep(.02)
        yield # still held
        self.mouse('mouseReleased', x+dx, y)
    def screenshot(self, path): path.write_bytes(base64.b64decode(self.send('Page.captureScreenshot')['data']))

@contextmanager
def running(command, **how):
    p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **how)
    try: yield p
    finally:
        p.terminate()
        try: p.wait(10)
        except subprocess.TimeoutExpired: p.kill()

@contextmanager
def browser(folder, size=(1100, 900)):
    "A page of a new Chromium"
    with running([CHROMIUM, *FLAGS, f'--user-data-dir={folder}', f'--window-size={size[0]},{size[1]}', 'about:blank']):
        port = until(lambda: (folder/'DevToolsActivePort').read_text().split()[0], what='Chromium')
        tabs = until(lambda: [t for t in json.load(urlopen(f'http://127.0.0.1:{port}/json')) if t['type'] == 'page'])
        yield Page(tabs[0]['webSocketDebuggerUrl'])

@contextmanager
def lab(folder):
    "The address of a JupyterLab on a folder"
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    own = {f'JUPYTER_{k}_DIR': str(folder/f'.{k.lower()}') for k in ('CONFIG', 'DATA', 'RUNTIME')}
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--expose-app-in-browser', '--allow-root', f'--ServerApp.port={port}',
               '--IdentityProvider.token=', '--ServerApp.password=', f'--ServerApp.root_dir={folder}',
               '--LabApp.news_url=', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    with running(command, env=os.environ | own, cwd=folder):
        until(lambda: urlopen(f'http://127.0.0.1:{port}/api').status == 200, what='JupyterLab')
        yield f'http://127.0.0.1:{port}'
