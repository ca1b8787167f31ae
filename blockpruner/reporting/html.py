"""A report as one HTML file that loads nothing: style inline, plots as inline SVG in the reader's own colours."""

from __future__ import annotations

import re

from jinja2 import Environment
from markupsafe import Markup

from blockpruner.reporting.page import Page
from blockpruner.reporting.plots import INK, PAPER, Plot

STYLE = """
:root{color-scheme:light dark;--page:#fff;--card:#f6f7f9;--ink:#1c1f24;--soft:#5b626d;--line:#dcdfe4;--accent:#1f6fab;
--warn:#b4471a;--warnbg:#fdf1eb;--good:#1f6fab;--goodbg:#ecf4fa}
@media(prefers-color-scheme:dark){:root{--page:#14161a;--card:#1d2025;--ink:#e4e6ea;--soft:#a0a7b2;--line:#343941;
--accent:#6cb2e6;--warn:#f0976b;--warnbg:#33211a;--good:#6cb2e6;--goodbg:#17283a}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
sans-serif}
main,header,footer{max-width:1160px;margin:0 auto;padding:0 20px}
header{padding-top:32px}
h1{font-size:1.8rem;line-height:1.2;margin:0 0 .3em;overflow-wrap:anywhere}
h2{font-size:1.35rem;margin:1.6em 0 .6em;padding-top:.8em;border-top:1px solid var(--line);overflow-wrap:anywhere}
h3{font-size:1.05rem;margin:1.8em 0 .5em}
header p,footer,.legend,figcaption{color:var(--soft);font-size:.875rem}
.findings{list-style:none;margin:0;padding:0;display:grid;gap:10px}
.findings li{background:var(--card);border-left:4px solid var(--line);border-radius:4px;padding:10px 14px;
overflow-wrap:anywhere}
.findings b{display:block}
.findings .warning{background:var(--warnbg);border-color:var(--warn)}.findings .warning b{color:var(--warn)}
.findings .advice{background:var(--goodbg);border-color:var(--good)}.findings .advice b{color:var(--good)}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9375rem;min-width:min(100%,560px)}
th,td{padding:6px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left;padding-left:0}
.headline th:first-child,.targets th:first-child{position:sticky;left:0;background:var(--page);padding-right:12px}
thead th{border-bottom:2px solid var(--line)}tbody th{font-weight:400}
.headline th:nth-child(2),.headline td:nth-child(2){color:var(--soft);font-weight:400}
.targets th:nth-child(2),.targets td:nth-child(2),.choices th:nth-child(n+3):nth-child(-n+4),
.choices td:nth-child(n+3):nth-child(-n+4){text-align:left}
.targets{font-size:.875rem}.targets th,.targets td{padding:6px 8px}.targets thead th{white-space:normal}
.targets th:nth-child(6){min-width:6em}
.targets th:first-child{padding-left:0}.targets td:nth-child(2){white-space:normal;min-width:13em}
tr.strong th,tr.strong td{font-weight:650}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,310px),1fr));gap:20px}
figure{margin:0 0 26px}.scroll+figure{margin-top:26px}figcaption{margin-top:6px}
figure svg{display:block;width:100%;height:auto}figure svg text{font-family:inherit!important}
details{margin:1em 0}summary{cursor:pointer;color:var(--accent)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 16px;font-size:.9375rem;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
footer{padding-top:20px;padding-bottom:40px;overflow-wrap:anywhere}
@media(max-width:560px){main,header,footer{padding-left:14px;padding-right:14px}header{padding-top:20px}
dl{grid-template-columns:1fr}dd{margin-bottom:8px}th,td{padding:6px 8px}}
@media print{details{display:block}.scroll{overflow:visible}}
"""

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ page.title }}</title>
<style>{{ style }}</style>
</head>
<body>
"""

MACROS = """\
{% macro table(data, kind) -%}
<div class="scroll"><table class="{{ kind }}">
<thead><tr>{% for cell in data.head %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in data.rows -%}
<tr{% if loop.index0 in data.strong %} class="strong"{% endif %}><th scope="row">{{ row[0] }}</th>
{%- for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor -%}
</tbody>
</table></div>
{%- endmacro %}
{% macro figure(plot) -%}
<figure>
{% if plot.wide -%}
<div class="scroll"><div style="min-width:{{ (plot.width * 72)|int }}px">{{ svg(plot) }}</div></div>
{%- else %}{{ svg(plot) }}{% endif %}
<figcaption>{{ plot.caption }}</figcaption>
</figure>
{%- endmacro %}
"""

TEMPLATE = """\
<header>
<h1>{{ page.title }}</h1>
<p>What is left of a language model when transformer blocks (attention: MHA, feed-forward: MLP) are taken out.
Dense: the model with all its blocks.</p>
</header>
<main>
{% for overview in page.overviews %}
<section>
<h2>{{ overview.title }}</h2>
{{ table(overview.choices, "choices") }}
{% for plot in overview.plots %}{{ figure(plot) }}
{% endfor %}
<h3>All targets</h3>
{{ table(overview.targets, "targets") }}
<p class="legend">{{ overview.legend }}</p>
</section>
{% endfor %}
{% for section in page.sections %}
<section>
<h2>{{ section.run }}</h2>
<ul class="findings">
{% for finding in section.findings %}<li class="{{ finding.level }}"><b>{{ finding.title }}</b>{{ finding.text }}</li>
{% endfor %}</ul>
<h3>Dense against pruned</h3>
{{ table(section.headline, "headline") }}
<p class="legend">{{ section.legend }}</p>
{% if section.plots %}
<h3>Plots</h3>
<div class="curves">
{% for plot in section.plots if not plot.wide %}{{ figure(plot) }}
{% endfor %}</div>
{% for plot in section.plots if plot.wide %}{{ figure(plot) }}
{% endfor %}
{% endif %}
{% for title, data in section.sequences %}
<details><summary>{{ title }}</summary>
{{ table(data, "sequence") }}
</details>
{% endfor %}
<h3>Model, data and work</h3>
<dl>
{% for name, text in section.facts %}<dt>{{ name }}</dt><dd>{{ text }}</dd>
{% endfor %}</dl>
</section>
{% endfor %}
</main>
<footer>{{ page.provenance }}</footer>
</body>
</html>
"""


def render_html(page: Page) -> str:
    environment = Environment(autoescape=True, trim_blocks=True)
    return environment.from_string(HEAD + MACROS + TEMPLATE).render(page=page, style=Markup(STYLE), svg=inline_svg)


def inline_svg(plot: Plot) -> Markup:
    """A plot's SVG for a page: no XML prolog, its ids made unique to the plot, lines and text in the page's colour."""
    svg = plot.svg[plot.svg.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "none")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{plot.name}-", svg)
    label = Markup.escape(plot.caption)
    return Markup(re.sub(r"<svg ", f'<svg role="img" aria-label="{label}" ', svg, count=1))
