"What the package promises before any work: light imports and a quick command line"
import importlib, json, pkgutil, re, resource, subprocess, sys
from pathlib import Path
import pytest
import yaml
import optiq

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
    from importlib.metadata import version
    assert optiq.__version__ == version('optiq')

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

def test_every_figure_has_a_description():
    found = list(figure_cells())
    assert len(found) > 20
    missing = [f'{name}, cell {cid}' for name, cid, options in found if len(str(options.get('fig-alt') or '')) < 20]
    assert not missing, f'no #| fig-alt: "…" in {missing}'
