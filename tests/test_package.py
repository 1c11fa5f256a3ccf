"What the package promises before any work: light imports and a quick command line"
import importlib, pkgutil, resource, subprocess, sys
import pytest
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
