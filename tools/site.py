"The site in _docs: by Quarto where it is installed, else by smalldocs; a broken link fails either way"
import re, shutil, subprocess, sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

cfg = get_config()

def processed():
    "The folder of notebooks as nbdev prepares them, under the names that their pages get"
    refresh_quarto_yml()
    folder = proc_nbs(n_workers=0, force=True)
    notebooks = list(folder.rglob('*.ipynb'))
    pages = {p.name: re.sub(r'^\d+[a-z]?_', '', p.name) for p in notebooks}
    for path in [*notebooks, *folder.glob('*.yml')]:
        text = re.sub(r'output-file: \S+\.html\\n', '', path.read_text(encoding='utf-8'))
        for old, new in pages.items(): text = text.replace(old, new)
        up = '../'*(len(path.relative_to(folder).parts)-1)
        if path.suffix == '.ipynb': text = text.replace(f'{cfg.doc_host}{cfg.doc_baseurl}/', up)
        path.unlink()
        path.with_name(pages.get(path.name, path.name)).write_text(text, encoding='utf-8')
    return folder

if __name__ == '__main__':
    folder = processed()
    smalldocs = Path(sys.executable).with_name('smalldocs')
    for command in [shutil.which('quarto') or smalldocs, 'render'], [smalldocs, 'check']:
        if code := subprocess.call([*command, folder]): sys.exit(code)
    shutil.rmtree(cfg.doc_path, ignore_errors=True)
    shutil.move(folder/cfg.doc_path.name, cfg.doc_path)
