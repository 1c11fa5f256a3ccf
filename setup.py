"Package metadata comes from `settings.ini`; only the extras stand here"
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
requirements = lambda key: cfg[key].strip().splitlines()

extras = dict(
    convert=['torch>=2.6', 'transformers>=5.7,<6', 'safetensors>=0.5', 'datasets>=4,<6'],
    vlm=['mlx-vlm>=0.7,<0.8', 'pillow>=10.3'],
    audio=['mlx-audio>=0.6,<0.7', 'datasets>=4,<6', 'jiwer>=4,<5', 'soundfile>=0.12,<1', 'whisper-normalizer>=0.1.15,<0.2'],
    gguf=['gguf>=0.17,<1'],
    lab=['jupyterlab>=4', 'ipywidgets>=8', 'matplotlib>=3.9', 'seaborn>=0.13', 'pandas>=2.2'])
extras['all'] = sum(extras.values(), [])
extras['dev'] = requirements('dev_requirements')

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='MIT',
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=find_packages(include=['optiq', 'optiq.*']), package_data={'optiq': ['data/**']},
    python_requires=f">={cfg['min_python']}",
    install_requires=requirements('requirements'), extras_require=extras,
    entry_points={'console_scripts': requirements('console_scripts'), 'nbdev': ['optiq=optiq._modidx:d']})
