"What the package promises before any work: light imports and a quick command line"
import ast, importlib, json, pkgutil, re, resource, subprocess, sys
from pathlib import Path
import pytest
import yaml
import optiq

root = Path(__file__).parents[1]
heavy = ['torch', 'transformers', 'mlx_vlm', 'mlx_audio', 'matplotlib']
modules = [m.name for m in pkgutil.walk_packages(optiq.__path__, 'optiq.') if not m.name.endswith('_modidx')]

def imported(code):
    "Which of the heavy packages a fresh interpreter has loaded after `code`"
    probe = f"{code}; import sys; print(*[m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, '-c', probe], capture_output=True, text=True, check=True).stdout
    return out.split()

def test_import_is_light():
    assert imported('import optiq') == []

@pytest.mark.parametrize('name', modules)
def test_module_imports(name):
    importlib.import_module(name)

def test_no_module_needs_an_extra():
    extras = ['torch', 'datasets', 'pandas', 'matplotlib', 'seaborn', 'ipywidgets', 'mlx_vlm', 'mlx_audio', 'jiwer']
    lines = [f'sys.modules.update({{name: None for name in {extras}}})', *(f'import {name}' for name in ['optiq', *modules])]
    out = subprocess.run([sys.executable, '-c', 'import sys; '+'; '.join(lines)], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr

def test_version():
    config = (root/'settings.ini').read_text(encoding='utf-8')
    assert re.search(r'^version = (.*)', config, re.M)[1] == optiq.__version__
    out = subprocess.run([sys.executable, '-m', 'optiq.cli', '--version'], capture_output=True, text=True)
    assert out.stdout.strip() == f'optiq, version {optiq.__version__}'

def test_nothing_leads_to_the_other_optiq():
    "On the package index `optiq` is another project: the distribution, its extras and its metadata are `optiq-mlx`"
    assert 'lib_name = optiq-mlx' in (root/'settings.ini').read_text(encoding='utf-8')
    wrong = re.compile(r"""\boptiq\\*\[[a-z]+\\*\]|\b(?:install|download|uvx|uv add)\b[^\n'"`;]{0,60}\s(?:\\?['"`])?optiq(?![\w./-])|"""
                       r"""(?:version|distribution|requires|package_name)\s*[(=]\s*['"]optiq['"]""")
    kinds = '.py', '.ipynb', '.md', '.ini', '.toml', '.yml', '.cff', '.sh', '.txt', '.json'
    files = subprocess.run(['git', 'ls-files'], cwd=root, capture_output=True, text=True, check=True).stdout.split('\n')
    read = {f: (root/f).read_text(encoding='utf-8') for f in files if f.endswith(kinds) or f in ('Makefile', '.ci/run')}
    found = [f'{f}: {m[0]}' for f, text in read.items() if f != 'tests/test_package.py' for m in wrong.finditer(text)]
    assert len(read) > 100 and not found, found
    bad = 'pip install optiq', "pip install -U 'optiq[lab]'", 'uv tool install optiq', "version('optiq')"
    good = "pip install 'optiq-mlx[all]'", 'pip install mlx-optiq', "pip freeze | grep -E 'optiq|mlx'"
    assert all(map(wrong.search, bad)) and not any(map(wrong.search, good))

def test_help_is_quick():
    def child_seconds():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime
    def once():
        before = child_seconds()
        out = subprocess.run([sys.executable, '-m', 'optiq.cli', '--help'], capture_output=True, text=True)
        assert out.returncode == 0 and 'convert' in out.stdout, out.stderr
        return child_seconds() - before
    assert min(once() for _ in range(3)) < 0.5

def figure_cells():
    "Every code cell of every notebook that shows a picture: notebook, cell id, its options"
    for p in sorted((Path(__file__).parents[1]/'nbs').rglob('*.ipynb')):
        for c in json.loads(p.read_text(encoding='utf-8'))['cells']:
            if c['cell_type'] == 'code' and any(m.startswith('image/') for o in c['outputs'] for m in o.get('data', {})):
                yield p.name, c['id'], yaml.safe_load('\n'.join(re.findall(r'^#\|\s*([\w-]+:.*)', ''.join(c['source']), re.M))) or {}

def test_a_title_has_a_cell_of_its_own():
    "nbdev takes the first cell for title and description; whatever else stood there would be missing on the page"
    for p in sorted((Path(__file__).parents[1]/'nbs').rglob('*.ipynb')):
        first = ''.join(json.loads(p.read_text(encoding='utf-8'))['cells'][0]['source'])
        assert re.fullmatch(r'# [^\n]+\n\n> [^\n]+', first), p.name

def prints(source):
    "Whether a cell prints as it runs, and its page shows that"
    if re.search(r'^#\|\s*(export|hide|eval: *false)|^[%!]', source, re.M): return False
    run = (node for s in ast.parse(source).body if not isinstance(s, (ast.FunctionDef, ast.ClassDef)) for node in ast.walk(s))
    return any(isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'print' for node in run)

def test_every_cell_that_prints_shows_what():
    "A new cell that nobody ran would promise an output that the page lacks"
    cells = [(p.name, c) for p in sorted((Path(__file__).parents[1]/'nbs').rglob('*.ipynb'))
             for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code' and prints(''.join(c['source']))]
    assert len(cells) > 100
    missing = [f'{name}, cell {c["id"]}' for name, c in cells if not c['outputs']]
    assert not missing, f'no output in {missing}; run tools/fill.py'

def test_every_figure_has_a_description():
    found = list(figure_cells())
    assert len(found) > 20
    missing = [f'{name}, cell {cid}' for name, cid, options in found if len(str(options.get('fig-alt') or '')) < 20]
    assert not missing, f'no #| fig-alt: "…" in {missing}'
