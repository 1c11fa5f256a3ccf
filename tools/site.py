"""The site in _docs: by Quarto where it is installed, else by smalldocs

Pages load nothing from another host: formulas become MathML, fonts are the reader's own. A broken link, a figure
without a description or anything loaded from elsewhere fails the build, whoever made it.
"""
import html, inspect, json, re, shutil, subprocess, sys
from dataclasses import is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from textwrap import wrap
from urllib.parse import unquote, urlsplit
import click
from fastcore.docments import docments
from latex2mathml.converter import convert as to_mathml
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from prose import figures

cfg = get_config()
ELSEWHERE = r'''@import\s*(?:url\([^)]*https?:[^)]*\)|"https?:[^"]*"|'https?:[^']*')[^;]*;''' # an address may hold semicolons
FIGURE = r'[-+]?[\d.]+(?:e-?\d+)?%? ± [\d.]+(?:e-?\d+)?%?' # a number and its error, which stay on one line
WIDE = 86 # characters of a line of output that a page has room for
quarto = shutil.which('quarto')

def plain_code(match):
    "A signature as code: without links, modules that no reader imports, and addresses of functions"
    code = re.sub(r'\[(`[^`]+`)\]\([^)\s]*\)', r'\1', match[0])
    code = re.sub(r'Form\(words=[^\n]*?holds=<function [^\n]*?>\)|<function <lambda>[^>]*>|<lambda>', '…', code)
    code = re.sub(r':(?:builtin_)?function(?:_or_method)?=', ':Callable=', code)
    code = re.sub(r':NoneType=None', '=None', re.sub(r'\b(?:__main__|collections\.abc|optiq(?:\.[a-z_]+)+)\.', '', code))
    return re.sub(r'=([A-Z]\w+)\((?:[^()]|\(\))+\)', r'=\1()', code) # a default with all its fields

def calm(text):
    "What nbdev writes of one function; its parameters stand in the signature, so their list for `help` goes"
    text = re.sub(r'\n\nParameters:\n(?:    [^\n]*(?:\n|$))+', '\n', text)
    return re.sub(r'```python\n.*?\n```', plain_code, text.replace('*Call self as a function.*', ''), flags=re.S)

@cache
def classes() -> dict:
    "The public classes of the package by name; what a notebook defines while nbdev runs it has no source with comments"
    from optiq._modidx import d
    found = ((n, getattr(m, n)) for m in map(import_module, d['syms']) for n in m.__all__)
    return {n: c for n, c in found if inspect.isclass(c)}

def as_class(text, name, cls):
    "What nbdev writes of a class, as a class, and with the comments of a dataclass's fields beside them, like parameters"
    said = docments(cls) if is_dataclass(cls) else {}
    def fields(match):
        each = re.split(rf',\s+(?=(?:{"|".join(said)})[:=])', match[1].strip()) if said else [' '.join(match[1].split())]
        rows = [f'    {f},'+(f' # {text}' if (text := said.get(re.split('[:=]', f)[0])) else '') for f in each]
        return f'class {name}(\n'+'\n'.join(rows)+'\n)' if any(said.values()) else f'class {name}({match[1]})'
    return re.sub(rf'def {name}\((.*?)\)(?:->None)?:(?=\n```)', fields, text, count=1, flags=re.S)

def calmed(notebook):
    "A notebook with what `show_doc` put out as people read it; what is private or undocumented has no place on a page"
    cells, known = [], classes()
    for c in notebook['cells']:
        source = ''.join(c['source'])
        for o in c.get('outputs', []):
            if 'show_doc(' in source:
                name = source.split('show_doc(')[1].split(')')[0]
                text = calm(''.join(o['data']['text/markdown']))
                o['data']['text/markdown'] = as_class(text, name, known[name]) if name in known else text
            elif 'text' in o: o['text'] = ''.join(map(folded, ''.join(o['text']).splitlines(True)))
            elif 'text/plain' in o.get('data', {}): o['data']['text/plain'] = folded(''.join(o['data']['text/plain']))
        hidden = re.search(r'show_doc\((?:main\)|.*\b_)', source) or 'show_doc(' in source and source_only(c)
        if not hidden: cells.append(c)
    return notebook | dict(cells=cells)

def source_only(cell) -> bool:
    "Whether `show_doc` found a signature and not a word about it"
    return all(''.join(o['data']['text/markdown']).rstrip().endswith('```') for o in cell['outputs'])

def folded(line):
    "A printed sentence wider than a page, in several lines; tables, and what is laid out in columns, stay as they are"
    if len(line) <= WIDE or '\n' in line[:-1] or re.search(r'\S {2,}\S|[─│]', line): return line
    return '\n'.join(wrap(line, WIDE, subsequent_indent='  ', break_long_words=False))+line[len(line.rstrip('\n')):]

def timed(notebook, source: Path):
    "A notebook that says under its title how long it takes to read, by the figure of `tools/prose.py`"
    said = f'*{max(1, round(figures(source)["minutes"]))} min to read*'
    notebook['cells'].insert(1, dict(cell_type='markdown', id='reading-time', metadata={}, source=[said]))
    return notebook

def processed():
    "The folder of notebooks as nbdev prepares them, under the names that their pages get"
    refresh_quarto_yml()
    folder = proc_nbs(n_workers=0, force=True)
    notebooks = list(folder.rglob('*.ipynb'))
    pages = {p.name: re.sub(r'^\d+[a-z]*_', '', p.name) for p in notebooks}
    for path in [*notebooks, *folder.glob('*.yml')]:
        text = re.sub(r'output-file: \S+\.html\\n', '', path.read_text(encoding='utf-8'))
        for old, new in pages.items(): text = text.replace(old, new)
        if not quarto: text = re.sub(r'\n *html-math-method: .*', '', text) # see `formula`
        up = '../'*(len(path.relative_to(folder).parts)-1)
        if path.suffix == '.ipynb': text = text.replace(f'{cfg.doc_host}{cfg.doc_baseurl}/', up)
        if path.suffix == '.ipynb':
            notebook = timed(calmed(json.loads(text)), cfg.nbs_path/path.relative_to(folder))
            if path.name.endswith('_cli.ipynb'): with_manual(notebook)
            text = json.dumps(notebook, ensure_ascii=False)
        path.unlink()
        path.with_name(pages.get(path.name, path.name)).write_text(text, encoding='utf-8')
    return folder

def unlisted():
    "Ends of addresses that nbdev would link to, of names that a module keeps to itself: no page has a place for them"
    from optiq._modidx import d
    for module, symbols in d['syms'].items():
        public = import_module(module).__all__
        for name, (address, _) in symbols.items():
            if name.removeprefix(module+'.').split('.')[0] not in public: yield address

def as_html(text):
    "Text of a help, with options as code: typography makes dashes of their hyphens elsewhere"
    return re.sub(r'(?<![\w-])(--?[a-z][\w-]*)', r'<code>\1</code>', html.escape(text))

def option_row(option, context):
    "What the help of a command says of one option: its name, what it is for, what it is by default"
    name, said = option.get_help_record(context)
    meaning, _, default = re.sub(r'\s*(?:; default: ([^][;]*)|\[default: ([^][]*)\])$', r'\0\1\2', said).partition('\0')
    return f'<tr><td><code>{html.escape(name)}</code></td><td>{as_html(meaning)}</td><td>{as_html(default)}</td></tr>'

def manual(name, command):
    "A command's own help, as a part of a page"
    context = click.Context(command, info_name=f'optiq {name}')
    prose, _, examples = inspect.cleandoc(command.help or '').partition('\b\n')
    usage = ' '.join([context.command_path, *command.collect_usage_pieces(context)])
    options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
    rows = ''.join(option_row(p, context) for p in options)
    table = ('<div class="table-responsive"><table class="options"><thead><tr><th>option</th><th>what it is for</th><th>default</th>'
             f'</tr></thead><tbody>{rows}</tbody></table></div>')
    shown = '\n'.join([usage, *(['', examples.strip()] if examples.strip() else [])])
    said = re.sub(r'(?<![\w-])(--[a-z][\w-]*)', r'`\1`', ' '.join(prose.split()))
    return '\n\n'.join([said, f'```sh\n{shown}\n```', table])

def with_manual(notebook):
    "The page of the command line with the help of each command under its heading, or at the end"
    from optiq.cli import main
    cells, first = notebook['cells'], lambda c: ''.join(c['source']).split('\n')[0]
    for name, command in main.commands.items():
        if not any(first(c) == f'## {name}' for c in cells):
            end = next((i for i, c in enumerate(cells) if first(c) == '## In the shell'), len(cells))
            cells.insert(end, dict(cell_type='markdown', id=f'heading-{name}', metadata={}, source=[f'## {name}']))
        place = next(i for i, c in enumerate(cells) if first(c) == f'## {name}')
        cells.insert(place+1, dict(cell_type='markdown', id=f'help-{name}', metadata={}, source=manual(name, command).splitlines(True)))
    return notebook

def formula(match):
    "One formula that smalldocs left to a script from a CDN, as MathML, which browsers draw themselves"
    tex = html.unescape(match[2]).strip()[2:-2]
    return to_mathml(tex, display='block' if match[1] == 'display' else 'inline')

def at_home(site):
    "Pages and style sheets that need no other host"
    hidden = '|'.join(map(re.escape, unlisted()))
    for page in site.rglob('*.html'):
        text = re.sub(rf'<a href="[^"]*({hidden})"[^>]*>(.*?)</a>', r'\2', page.read_text(encoding='utf-8'), flags=re.S)
        text = re.sub(r'<span class="math (inline|display)">(.*?)</span>', formula, text, flags=re.S)
        text = re.sub(r'<(?:link|script)[^>]*katex[^>]*>(?:</script>)?\s*', '', text)
        text = re.sub(r'<td[^>]*>[^<]* ± [^<]*</td>', lambda m: re.sub(FIGURE, r'<span class="figure-text">\g<0></span>', m[0]), text)
        page.write_text(text, encoding='utf-8')
    for sheet in site.rglob('*.css'):
        text = sheet.read_text(encoding='utf-8')
        sheet.write_text(re.sub(ELSEWHERE, '', text), encoding='utf-8')

def faults(site):
    "What a reader would stumble over: links to nowhere, figures without a description, loads from elsewhere"
    pages = {p: p.read_text(encoding='utf-8') for p in site.rglob('*.html')}
    ids = {p: set(re.findall(r'\bid="([^"]+)"', t)) for p, t in pages.items()}
    for page, text in pages.items():
        name = page.relative_to(site)
        body = re.sub(r'<pre.*?</pre>', '', text, flags=re.S)
        for tag in re.findall(r'<(?:a|link|script|img)\s[^>]*>', body):
            target = re.search(r'\b(?:href|src)="([^"]*)"', tag)
            url = urlsplit(html.unescape(target[1]) if target else '')
            if url.scheme or url.netloc:
                if tag[1] in 'si' and url.scheme != 'data' or 'stylesheet' in tag: yield f'{name} loads {target[1]}'
                continue
            file = page if not url.path else (page.parent/unquote(url.path)).resolve()
            if file.is_dir(): file = file/'index.html'
            if not file.exists(): yield f'{name} links to {target[1]}, which is not there'
            elif url.fragment and file in ids and unquote(url.fragment) not in ids[file]:
                yield f'{name} links to {target[1]}: no such place on that page'
        for tag in re.findall(r'<img\s[^>]*>', body):
            if not re.search(r'\balt="[^"]', tag): yield f'{name} has a figure without a description (fig-alt): {tag[:120]}'
        for tag in re.findall(r'<svg\s[^>]*role="img"[^>]*>', body):
            if 'aria-label' not in tag: yield f'{name} has a drawing without aria-label'
    for sheet in site.rglob('*.css'):
        if re.search(ELSEWHERE, sheet.read_text(encoding='utf-8')): yield f'{sheet.name} loads a style sheet from elsewhere'

if __name__ == '__main__':
    folder = processed()
    smalldocs = Path(sys.executable).with_name('smalldocs')
    for command in [quarto or smalldocs, 'render'], [smalldocs, 'check']:
        if code := subprocess.call([*command, folder]): sys.exit(code)
    at_home(folder/cfg.doc_path.name)
    found = list(faults((folder/cfg.doc_path.name).resolve()))
    for fault in found: print(fault, file=sys.stderr)
    if found: sys.exit(1)
    shutil.rmtree(cfg.doc_path, ignore_errors=True)
    shutil.move(folder/cfg.doc_path.name, cfg.doc_path)
