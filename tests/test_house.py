"How the package is built: no circles, and lines that fit"
import json, subprocess, sys
from pathlib import Path

root = Path(__file__).parents[1]
sys.path.insert(0, str(root/'tools'))
from house import figures # noqa: E402

def test_imports_make_no_circle_and_run_one_way(): # import-linter sees neither the modules of a folder nor circles below one layer
    found = figures()
    assert found['circles'] == found['upward'] == []

def test_lines_of_the_package_fit():
    ruff = [Path(sys.executable).with_name('ruff'), 'check', '--select', 'E501', '--line-length', '120', '--config', 'lint.per-file-ignores={}']
    out = subprocess.run([*ruff, '--output-format', 'json', 'optiq'], cwd=root, capture_output=True, text=True)
    faults = [(Path(f['filename']), f['location']['row']) for f in json.loads(out.stdout)]
    shown = [(p.name, row) for p, row in faults if not p.read_text(encoding='utf-8').splitlines()[row-1].startswith('__all__ = ')] # nbdev's
    assert shown == []
