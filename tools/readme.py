"README.md and CONTRIBUTING.md from their notebooks, without Quarto"
import base64, json, re
from pathlib import Path

root = Path(__file__).parents[1]

def output(out):
    if out['output_type'] == 'stream': return out['text'] if out['name'] == 'stdout' else []
    data = out.get('data', {})
    if 'text/markdown' in data: return data['text/markdown']
    return data.get('text/plain', [])

def picture(cell, png):
    "Keep a figure beside the notebooks, and point to it"
    alt = re.search(r'^#\|\s*fig-alt:\s*(.*)', ''.join(cell['source']), re.M)
    file = root/'nbs'/'images'/f'{cell["id"]}.png'
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(base64.b64decode(''.join(png)))
    return f'![{alt[1].strip() if alt else "figure"}]({file.relative_to(root).as_posix()})'

def fenced(text, language=''): return f'```{language}\n{text.strip(chr(10))}\n```'

def from_root(match):
    "A link relative to nbs/, seen from the top folder"
    target = match[1]
    return f'](nbs/{target})' if (root/'nbs'/target.split('#')[0]).is_file() else match[0]

def relinked(text): return re.sub(r'\]\(([^)\s:]+)\)', from_root, text)

def render(cell):
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown': return [relinked(source)]
    if cell['cell_type'] != 'code' or re.search(r'^#\|\s*hide\s*$', source, re.M): return []
    shown = '\n'.join(line for line in source.splitlines() if not line.startswith('#|'))
    hidden = re.search(r'^#\|\s*echo:\s*false', source, re.M)
    parts = [] if hidden else [fenced(shown, 'python')]
    for out in cell['outputs']:
        if 'image/png' in out.get('data', {}):
            parts.append(picture(cell, out['data']['image/png']))
            continue
        text = ''.join(output(out))
        if not text.strip(): continue
        parts.append(relinked(text) if 'text/markdown' in out.get('data', {}) else fenced(text))
    return parts

if __name__ == '__main__':
    for page, file in dict(index='README.md', contributing='CONTRIBUTING.md').items():
        cells = json.loads((root/f'nbs/{page}.ipynb').read_text(encoding='utf-8'))['cells']
        note = f'<!-- Made from nbs/{page}.ipynb by `make readme`; edit there. -->'
        (root/file).write_text('\n\n'.join([note, *sum(map(render, cells), [])]) + '\n', encoding='utf-8')
