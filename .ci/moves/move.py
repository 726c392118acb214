# ruff: noqa
"""Move definitions between modules of a package by a list, and rewrite every import. move.py REPO PLAN.py [--dry]"""

import argparse, ast, builtins, io, re, runpy, subprocess, sys, tokenize
from collections import defaultdict, Counter
from pathlib import Path

PKG = "hfllm"
DIRS = ("hfllm", "recipes", "tests", "benchmarks", ".ci")
TEXTS = ("*.md", "*.toml", "*.yaml", "*.yml", "*.txt", "*.cfg", "Makefile")
problems: list[str] = []


def say(text):
    problems.append(text)


def bound_targets(node):
    """Names that a statement at module level binds."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    found = set()
    if isinstance(node, ast.Assign):
        for t in node.targets:
            found |= {n.id for n in ast.walk(t) if isinstance(n, ast.Name)}
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        found |= {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
    elif isinstance(node, (ast.If, ast.Try, ast.With, ast.For, ast.While)):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                found |= bound_targets(child)
            elif isinstance(child, ast.ExceptHandler):
                for c in child.body:
                    found |= bound_targets(c)
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        found |= {a.asname or a.name.split(".")[0] for a in node.names}
    return found


def is_typing(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not node.orelse


class Item:
    def __init__(self, module, node, start, end, kind):
        self.module, self.node, self.start, self.end, self.kind = module, node, start, end, kind
        self.names = bound_targets(node) if kind in ("def", "other") and node is not None else set()


class Module:
    def __init__(self, repo, path):
        self.path = path
        self.rel = path.relative_to(repo).as_posix()
        parts = path.relative_to(repo).with_suffix("").parts
        self.is_package = parts[-1] == "__init__"
        self.name = ".".join(parts[:-1] if self.is_package else parts)
        self.text = path.read_text(encoding="utf-8")
        self.lines = self.text.splitlines(keepends=True)
        self.tree = ast.parse(self.text)
        self.in_package = parts[0] == PKG
        self.offsets = [0]
        for line in self.lines:
            self.offsets.append(self.offsets[-1] + len(line))
        self._blines = [line.encode() for line in self.lines]
        self.items = self._items()
        self.defined = {n for i in self.items if i.kind in ("def", "other") for n in i.names}
        self.imported = {}  # binding -> (module, name) of hfllm, top level
        for i in self.items:
            if i.kind == "import":
                for b, m, n in self.entries(i.node):
                    self.imported[b] = (m, n)

    def offset(self, lineno, col):
        line = self._blines[lineno - 1]
        return self.offsets[lineno - 1] + len(line[:col].decode())

    def package(self):
        return self.name if self.is_package else self.name.rpartition(".")[0]

    def base_of(self, node):
        if not node.level:
            return node.module or ""
        parts = self.package().split(".")
        parts = parts[: len(parts) - (node.level - 1)]
        return ".".join(parts + ([node.module] if node.module else []))

    def entries(self, node):
        """(binding, module, name) of an import; name None for `import x`, with binding as 'as' or dotted."""
        if isinstance(node, ast.Import):
            return [(a.asname or a.name, a.name, None) for a in node.names]
        base = self.base_of(node)
        return [(a.asname or a.name, base, a.name) for a in node.names]

    def _items(self):
        items, last = [], 0
        for i, node in enumerate(self.tree.body):
            kind = "other"
            if (
                isinstance(node, ast.Assign)
                and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
                and not self.is_package
            ):
                items.append(Item(self, node, last, node.end_lineno, "all"))
                last = node.end_lineno
                continue
            if (
                i == 0
                and isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                kind = "doc"
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                kind = "import"
            elif is_typing(node):
                kind = "typing"
            elif isinstance(
                node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AugAssign)
            ):
                kind = "def"
            items.append(Item(self, node, last, node.end_lineno, kind))
            last = node.end_lineno
        if "".join(self.lines[last:]).strip():
            items.append(Item(self, None, last, len(self.lines), "tail"))
        return items


def eval_names(node):
    """Names that are read while the module is imported."""
    out = set()

    def expr(e):
        if e is None:
            return
        todo = [e]
        while todo:
            n = todo.pop()
            if isinstance(n, ast.Lambda):
                todo += [d for d in [*n.args.defaults, *n.args.kw_defaults] if d]
                continue
            if isinstance(n, ast.Name):
                out.add(n.id)
            if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name):
                out.add(f"{n.value.id}.{n.attr}")
            todo += list(ast.iter_child_nodes(n))

    def fun(n):
        for d in n.decorator_list:
            expr(d)
        a = n.args
        for x in [*a.defaults, *a.kw_defaults]:
            expr(x)
        for x in [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]:
            if x is not None:
                expr(x.annotation)
        expr(n.returns)

    def stmt(n):
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)):
            fun(n)
        elif isinstance(n, ast.ClassDef):
            for d in [*n.decorator_list, *n.bases, *[k.value for k in n.keywords]]:
                expr(d)
            for b in n.body:
                stmt(b)
        else:
            for c in ast.iter_child_nodes(n):
                if isinstance(c, ast.stmt):
                    stmt(c)
                elif isinstance(c, ast.expr):
                    expr(c)
                else:
                    for d in ast.walk(c):
                        if isinstance(d, ast.Name):
                            out.add(d.id)

    stmt(node)
    return out


def wrapped(doc):
    """Lines of at most 117 characters; paragraphs are filled again where one of their lines is longer."""
    import textwrap

    out = []
    for part in re.split(r"(\n\s*\n)", doc):
        lines = part.splitlines()
        if not part.strip():
            out.append("")
        elif max(map(len, lines)) > 117 and not any(x.startswith((" ", "-", "|")) for x in lines):
            out += textwrap.wrap(" ".join(lines), 117, break_long_words=False, break_on_hyphens=False)
        else:
            out += lines
    return out


class Mover:
    def __init__(self, repo, plan):
        self.repo = repo
        self.files = {}
        for d in DIRS:
            for p in sorted((repo / d).rglob("*.py")):
                if ".venv" in p.parts or "__pycache__" in p.parts:
                    continue
                m = Module(repo, p)
                self.files[m.rel] = m
        self.modules = {m.name: m for m in self.files.values() if m.in_package}
        self.plan = plan
        self.target_of = {}  # module name -> target module name (default)
        self.order = {}
        for target, sources in plan["moves"].items():
            t = self.mod(target)
            self.order[t] = [self.mod(s) for s in sources]
            for s in sources:
                if self.mod(s) not in self.modules:
                    sys.exit(f"no source {s}")
                if self.mod(s) in self.target_of:
                    sys.exit(f"twice: {s}")
                self.target_of[self.mod(s)] = t
        self.special = {}  # (module, name) -> target
        for source, by in plan.get("splits", {}).items():
            for target, names in by.items():
                for n in names:
                    if n not in self.modules[self.mod(source)].defined:
                        say(f"split: {source} has no {n}")
                    self.special[self.mod(source), n] = self.mod(target)
        self.renames = {(self.mod(s), n): new for (s, n), new in plan.get("renames", {}).items()}
        self.dedupe = {(self.mod(s), n): self.mod(keep) for (s, n), keep in plan.get("dedupe", {}).items()}
        self.assembled = set()
        self.alias_uses = {}
        self.targets = defaultdict(list)  # target -> [(module, [items])]
        for m in self.modules.values():
            by = defaultdict(list)
            for i in m.items:
                if i.kind in ("def", "other", "tail"):
                    by[self.item_target(i)].append(i)
            default = self.default(m.name)
            by.setdefault(default, [])
            for t, items in by.items():
                self.targets[t].append((m, items))
        self.assembled = (
            {t for t, chunks in self.targets.items() if len(chunks) > 1}
            | {self.default(m) for (m, _) in self.special}
            | {self.default(m) for (m, _) in self.renames}
            | {t for t in self.special.values()}
        )

    def mod(self, rel):
        rel = rel if rel.startswith(PKG) else f"{PKG}/{rel}"
        return rel.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def default(self, name):
        return self.target_of.get(name, name)

    def item_target(self, item):
        m = item.module.name
        found = {self.special.get((m, n)) for n in item.names} - {None}
        if len(found) > 1:
            say(f"{m}: {item.names} go to {found}")
        return found.pop() if found else self.default(m)

    def resolve(self, module, name, seen=()):
        """Where a name of an old module is now: (module, name), or None if it is no definition of ours."""
        m = self.modules.get(module)
        if m is None or (module, name) in seen:
            return None
        if (module, name) in self.dedupe:
            return self.dedupe[module, name], name
        if name in m.defined and name not in m.imported:
            return self.special.get((module, name), self.default(module)), self.renames.get((module, name), name)
        if name in m.imported:
            base, n = m.imported[name]
            if self.default(module) == module and module not in self.assembled:
                return module, name
            if n is not None and base.startswith(PKG):
                if f"{base}.{n}" in self.modules:
                    return None
                return self.resolve(base, n, (*seen, (module, name)))
        return None

    # ---- one import statement ----

    def new_entries(self, module, node, here):
        """Entries (binding, newmodule, newname) of an import from hfllm; the second list are modules by alias."""
        names, mods, same = [], [], True
        for b, base, n in module.entries(node):
            full = f"{base}.{n}" if n else base
            if n is None:
                return None
            if full in self.modules:
                mods.append((b, full))
                continue
            found = self.resolve(base, n)
            if found is None:
                m = self.modules.get(base)
                if m is not None and not m.is_package:
                    # imported by the old module from elsewhere
                    if n in m.imported:
                        found = (self.default(base), n)
                        say(f"{module.rel}: {n} of {base} is another's")
                    else:
                        say(f"{module.rel}: {base} has no {n}")
                found = found or (base, n)
            if found[1] != n and b == n:
                b = found[1]
            names.append((b, *found))
        return names, mods

    def line_of(self, newmod, pairs, relative, here):
        pairs = sorted(set(pairs))
        text = ", ".join(n if n == b else f"{n} as {b}" for n, b in pairs)
        if relative and here.rpartition(".")[0] == newmod.rpartition(".")[0]:
            newmod = "." + newmod.rpartition(".")[2]
        return f"from {newmod} import {text}"

    def module_alias(self, module, alias, full, here):
        """What becomes of `from pkg import module`: (None if local, or new module), with uses."""
        attrs = set()
        bare = False
        inner = set()
        for n in ast.walk(module.tree):
            if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == alias:
                attrs.add(n.attr)
                inner.add(id(n.value))
            elif isinstance(n, ast.Call):
                for a, c in zip(n.args, n.args[1:]):
                    if (
                        isinstance(a, ast.Name)
                        and a.id == alias
                        and isinstance(c, ast.Constant)
                        and isinstance(c.value, str)
                    ):
                        attrs.add(c.value)
                        inner.add(id(a))
        for n in ast.walk(module.tree):
            if isinstance(n, ast.Name) and n.id == alias and isinstance(n.ctx, ast.Load) and id(n) not in inner:
                bare = True
        where = {}
        m = self.modules[full]
        for a in attrs:
            found = self.resolve(full, a) if a in m.defined else None
            where[a] = found or (self.default(full), a)
        news = {t for t, _ in where.values()} or {self.default(full)}
        if bare:
            news.add(self.default(full))
            if self.default(full) != full:
                say(f"{module.rel}: {alias} ({full}) is used as a value")
        main = self.default(full) if self.default(full) in news else sorted(news)[0]
        self.alias_uses[module.rel, alias, full] = (main, where)
        return main, sorted(news - {main})

    def alias_for(self, alias, target, main):
        return alias if target == main else f"{alias}_{target.rpartition('.')[2]}"

    # ---- edits of a file's text ----

    def edits(self, module, here, top_imports):
        """Edits (start, end, text) of a module's text; `top_imports`: whether those at module level too."""
        out = []
        top = {id(n) for n in module.tree.body}
        typing_top = {id(n): t for t in module.tree.body if is_typing(t) for n in t.body}
        only_child = set()
        for n in ast.walk(module.tree):
            for field in ("body", "orelse", "finalbody"):
                block = getattr(n, field, None)
                if isinstance(block, list) and len(block) == 1 and isinstance(block[0], ast.stmt):
                    only_child.add(id(block[0]))
        aliases = {}
        for n in ast.walk(module.tree):
            if isinstance(n, ast.Import):
                for a in n.names:
                    if a.name in self.modules and a.name != PKG and self.default(a.name) != a.name:
                        if a.asname:
                            new, more = self.module_alias(module, a.asname, a.name, here)
                            if more:
                                say(f"{module.rel}: {a.name} as {a.asname} is {more} too")
                            s, e = module.offset(a.lineno, a.col_offset), module.offset(a.end_lineno, a.end_col_offset)
                            out.append((s, e, f"{new} as {a.asname}"))
                        else:
                            s, e = module.offset(a.lineno, a.col_offset), module.offset(a.end_lineno, a.end_col_offset)
                            out.append((s, e, self.default(a.name)))
                            say(f"{module.rel}:{n.lineno}: import {a.name}: look at its uses")
                continue
            if not isinstance(n, ast.ImportFrom):
                continue
            base = module.base_of(n)
            if not (base == PKG or base.startswith(PKG + ".")):
                continue
            names, mods = self.new_entries(module, n, here)
            for alias, full in mods:
                new, more = self.module_alias(module, alias, full, here)
                aliases[alias] = full
                for each in (new, *more):
                    if each != here:
                        names.append(
                            (self.alias_for(alias, each, new), each.rpartition(".")[0], each.rpartition(".")[2])
                        )
            if id(n) in top and not top_imports:
                continue
            if id(n) in typing_top and not top_imports:
                continue
            old = sorted((b, base if x else "", x) for b, base, x in module.entries(n))
            if (
                sorted((b, m, x) for b, m, x in names) == old
                and not (here != module.name and n.level)
                and not any(m == here for _, m, _ in names)
            ):
                continue
            by = defaultdict(list)
            for b, m, x in names:
                if m == here:
                    if b != x:
                        say(f"{module.rel}:{n.lineno}: {x} as {b} is local now")
                    continue
                by[m].append((x, b))
            relative = n.level > 0
            indent = " " * n.col_offset
            lines = [self.line_of(m, pairs, relative, here) for m, pairs in sorted(by.items())]
            s, e = module.offset(n.lineno, n.col_offset), module.offset(n.end_lineno, n.end_col_offset)
            rest = module.text[e : module.text.find("\n", e)]
            if "noqa" in rest and not lines:
                say(f"{module.rel}:{n.lineno}: noqa of a dropped import")
            if not lines and id(n) in only_child:
                lines = ["pass"]
            if lines:
                out.append((s, e, f"\n{indent}".join(lines)))
            else:
                begin = module.offsets[n.lineno - 1]
                end = module.text.find("\n", e) + 1
                out.append((begin, end, ""))
        for alias, full in aliases.items():
            main, where = self.alias_uses[module.rel, alias, full]
            for n in ast.walk(module.tree):
                if (
                    isinstance(n, ast.Attribute)
                    and isinstance(n.value, ast.Name)
                    and n.value.id == alias
                    and n.attr in where
                ):
                    t, x = where[n.attr]
                    s, e = module.offset(n.lineno, n.col_offset), module.offset(n.end_lineno, n.end_col_offset)
                    new = x if t == here else f"{self.alias_for(alias, t, main)}.{x}"
                    if new != f"{alias}.{n.attr}":
                        out.append((s, e, new))
                elif isinstance(n, ast.Call):
                    for a, c in zip(n.args, n.args[1:]):
                        if (
                            isinstance(a, ast.Name)
                            and a.id == alias
                            and isinstance(c, ast.Constant)
                            and c.value in where
                        ):
                            t, x = where[c.value]
                            if self.alias_for(alias, t, main) != alias:
                                out.append(
                                    (
                                        module.offset(a.lineno, a.col_offset),
                                        module.offset(a.end_lineno, a.end_col_offset),
                                        self.alias_for(alias, t, main),
                                    )
                                )
                            if x != c.value:
                                out.append(
                                    (
                                        module.offset(c.lineno, c.col_offset),
                                        module.offset(c.end_lineno, c.end_col_offset),
                                        repr(x).replace("'", '"'),
                                    )
                                )
        out += self.rename_edits(module)
        out += self.string_edits(module, out)
        return out

    def other_bindings(self, module, name):
        """Whether a name is bound anywhere but at module level: then a rename needs eyes."""
        for n in ast.walk(module.tree):
            if isinstance(n, ast.arg) and n.arg == name:
                return True
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name and n not in module.tree.body:
                return True
            if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, (ast.Store, ast.Del)):
                if not any(
                    n in ast.walk(t)
                    for t in module.tree.body
                    if isinstance(t, (ast.Assign, ast.AnnAssign, ast.AugAssign))
                ):
                    return True
            if isinstance(n, ast.ExceptHandler) and n.name == name:
                return True
        return False

    def rename_edits(self, module):
        out = []
        mine = {n: new for (m, n), new in self.renames.items() if m == module.name}
        theirs = {}
        for n in ast.walk(module.tree):
            if isinstance(n, ast.ImportFrom):
                for b, base, x in module.entries(n):
                    found = (
                        self.resolve(base, x) if base in self.modules and f"{base}.{x}" not in self.modules else None
                    )
                    if found and found[1] != x and b == x:
                        theirs[x] = found[1]
        for name, new in {**mine, **theirs}.items():
            if self.other_bindings(module, name):
                say(f"{module.rel}: rename of {name} to {new}: it is bound elsewhere too")
            for n in ast.walk(module.tree):
                if isinstance(n, ast.Name) and n.id == name:
                    s, e = module.offset(n.lineno, n.col_offset), module.offset(n.end_lineno, n.end_col_offset)
                    out.append((s, e, new))
                elif isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name and n in module.tree.body:
                    line = module.lines[n.lineno - 1]
                    at = re.search(rf"\b(?:def|class)\s+({name})\b", line)
                    s = module.offsets[n.lineno - 1] + at.start(1)
                    out.append((s, s + len(name), new))
                elif (
                    isinstance(n, ast.Constant)
                    and isinstance(n.value, str)
                    and re.search(rf"\b{name}\b", n.value)
                    and n.value.isidentifier()
                ):
                    say(f"{module.rel}:{n.lineno}: the text {n.value!r} may name {name}")
        return out

    def string_edits(self, module, taken):
        out = []
        spans = [(s, e) for s, e, _ in taken]
        for tok in tokenize.generate_tokens(io.StringIO(module.text).readline):
            if tok.type in (tokenize.STRING, tokenize.COMMENT) and (PKG + "." in tok.string or ".py" in tok.string):
                s = self._off(module, tok.start)
                e = self._off(module, tok.end)
                if any(a <= s < b for a, b in spans):
                    continue
                new = self.new_text(tok.string)
                if new != tok.string:
                    out.append((s, e, new))
        return out

    def _off(self, module, pos):
        return module.offsets[pos[0] - 1] + pos[1]

    def new_text(self, text):
        """Dotted names and paths of moved modules in any text."""

        def dotted(found):
            parts = found[0].split(".")
            for k in range(len(parts), 1, -1):
                name = ".".join(parts[:k])
                m = self.modules.get(name)
                if m is None or (m.is_package and k == len(parts)):
                    continue
                rest = parts[k:]
                if rest and (rest[0] in m.defined or rest[0] in m.imported):
                    new = self.resolve(name, rest[0])
                    if new is None or rest[0] in m.imported:
                        return ".".join([self.default(name), *rest])
                    return ".".join([new[0], new[1], *rest[1:]])
                if m.is_package:
                    return found[0]
                return ".".join([self.default(name), *rest])
            return found[0]

        def path(found):
            name = found[0].removesuffix(".py").replace("/", ".")
            m = self.modules.get(name)
            return found[0] if m is None else self.default(name).replace(".", "/") + ".py"

        text = re.sub(r"(?<![\w/.@-])hfllm(?:\.[A-Za-z_]\w*)+(?![\w])(?!\()?", dotted, text)
        return re.sub(r"(?<![\w/.-])hfllm/[\w/]+\.py", path, text)

    @staticmethod
    def apply(text, edits, start=0, end=None):
        end = len(text) if end is None else end
        mine = sorted({e for e in edits if e[0] >= start and e[1] <= end})
        out, at = [], start
        for s, e, new in mine:
            if s < at:
                say(f"edits overlap at {text[s:e]!r}")
                continue
            out += [text[at:s], new]
            at = e
        return "".join([*out, text[at:end]])

    # ---- whole files ----

    def run(self):
        new_files, gone = {}, set()
        for m in self.files.values():
            if m.in_package and (
                self.default(m.name) in self.assembled
                or any(self.item_target(i) in self.assembled for i in m.items if i.kind in ("def", "other"))
            ):
                continue
            here = self.default(m.name) if m.in_package else m.name
            text = self.apply(m.text, self.edits(m, here, True))
            rel = here.replace(".", "/") + ".py" if m.in_package and not m.is_package else m.rel
            if rel != m.rel:
                gone.add(m.rel)
            if text != m.text or rel != m.rel:
                new_files[rel] = text
        for t in sorted(self.assembled):
            new_files[t.replace(".", "/") + ".py"] = self.assemble(t)
        for m in self.modules.values():
            rel = self.default(m.name).replace(".", "/") + ".py"
            if not m.is_package and rel != m.rel:
                gone.add(m.rel)
        gone -= set(new_files)
        return new_files, gone

    def assemble(self, target):
        chunks = [(m, items) for m, items in self.targets[target] if items or self.default(m.name) == target]
        order = self.order.get(target, [])
        if target in self.modules and target not in order and self.default(target) == target:
            order = [target, *order]
        rank = {name: k for k, name in enumerate(order)}
        chunks.sort(key=lambda c: (rank.get(c[0].name, 99), c[0].name))
        main = order[0] if order else chunks[0][0].name
        owner = {}  # new name -> (chunk index)
        for k, (m, items) in enumerate(chunks):
            for i in items:
                for n in i.names:
                    if (m.name, n) in self.dedupe:
                        continue
                    new = self.renames.get((m.name, n), n)
                    if new in owner and owner[new] != k:
                        say(f"COLLISION in {target}: {new} of {chunks[owner[new]][0].name} and {m.name}")
                    owner[new] = k
                    if hasattr(builtins, new):
                        say(f"{target}: {new} hides a builtin")
        # headers
        runtime, typing = {}, {}
        noqa = []

        def add(table, b, origin, m):
            if b in table and table[b] != origin:
                say(f"IMPORTS in {target}: {b} is {table[b]} and {origin} ({m.name})")
            if b in owner and origin != (target, b):
                say(f"IMPORT AND DEFINITION in {target}: {b} of {origin} ({m.name}) and {chunks[owner[b]][0].name}")
            table[b] = origin

        extra = []
        for m, items in chunks:
            texts = "".join("".join(m.lines[i.start : i.end]) for i in items)
            whole = self.default(m.name) == target and all(i in items for i in m.items if i.kind in ("def", "other"))
            for i in m.items:
                if i.kind == "import":
                    nodes, table = [i.node], runtime
                elif i.kind == "typing":
                    nodes, table = i.node.body, typing
                else:
                    continue
                lead = "".join(m.lines[i.start : i.node.lineno - 1]).strip()
                if lead:
                    say(f"{m.rel}:{i.node.lineno}: a comment above an import: {lead}")
                for node in nodes:
                    if not isinstance(node, (ast.Import, ast.ImportFrom)):
                        extra.append(ast.unparse(node))
                        continue
                    if isinstance(node, ast.ImportFrom) and (
                        m.base_of(node) == PKG or m.base_of(node).startswith(PKG + ".")
                    ):
                        names, mods = self.new_entries(m, node, target)
                        for alias, full in mods:
                            new, more = self.module_alias(m, alias, full, target)
                            for each in (new, *more):
                                if each != target:
                                    names.append(
                                        (
                                            self.alias_for(alias, each, new),
                                            each.rpartition(".")[0],
                                            each.rpartition(".")[2],
                                        )
                                    )
                        rel = node.level > 0
                    else:
                        names, rel = [(b, base, n) for b, base, n in m.entries(node)], False
                        if isinstance(node, ast.ImportFrom) and node.level:
                            say(f"{m.rel}: relative {ast.unparse(node)}")
                    line_end = m.lines[node.end_lineno - 1]
                    for b, base, n in names:
                        if base == target:
                            if n != b:
                                say(f"{m.rel}: {n} as {b} is local now")
                            continue
                        was = next((old for (_, old), new in self.renames.items() if new == b), b)
                        if not whole and not re.search(
                            rf"\b(?:{re.escape(b.split('.')[0])}|{was.split('.')[0]})\b", texts
                        ):
                            continue
                        add(table, b, (base, n), m)
                        if "noqa" in line_end:
                            noqa.append((base, n, line_end[line_end.index("#") :].strip()))
                        if rel:
                            self.rel.add((target, base))
            # names of the old module that went elsewhere
            for i in items:
                if i.node is None:
                    continue
                used = {x.id for x in ast.walk(i.node) if isinstance(x, ast.Name)}
                used |= {
                    w
                    for x in ast.walk(i.node)
                    if isinstance(x, ast.Constant) and isinstance(x.value, str) and len(x.value) < 80
                    for w in re.findall(r"\w+", x.value)
                    if w in m.defined and w[:1].isupper()
                }
                for n in used & m.defined:
                    found = self.resolve(m.name, n)
                    if found and found[0] != target:
                        add(runtime, found[1], (found[0], found[1]), m)
        for b in list(typing):
            if b in runtime:
                typing.pop(b)
        lines = []
        for table in (runtime, typing):
            by, plain = defaultdict(list), []
            for b, (base, n) in table.items():
                if n is None:
                    plain.append(f"import {base}" if b == base else f"import {base} as {b}")
                else:
                    by[base].append((n, b))
            block = sorted(plain) + [
                self.line_of(base, pairs, (target, base) in self.rel, target) for base, pairs in sorted(by.items())
            ]
            for base, n, comment in noqa:
                block = [
                    f"{x}  {comment}"
                    if x.startswith((f"import {base}", f"from {base} import")) and comment not in x
                    else x
                    for x in block
                ]
            lines.append(block)
        head = "\n".join(lines[0]) + "\n"
        if lines[1] or extra:
            head = "from typing import TYPE_CHECKING\n" + head
            head += "\nif TYPE_CHECKING:\n" + "\n".join("    " + x for x in [*lines[1], *dict.fromkeys(extra)]) + "\n"
        # order of chunks
        names_of = [{self.renames.get((m.name, n), n) for i in items for n in i.names} for m, items in chunks]
        needs = []
        for k, (m, items) in enumerate(chunks):
            read = set()
            for i in items:
                if i.node is not None and i.kind in ("def", "other"):
                    read |= eval_names(i.node)
            read = {self.local_name(m, r, target) for r in read}
            needs.append({owner[r] for r in read if r in owner and owner[r] != k})
        sequence = []  # (chunk, item) in the order of the file
        place_of = {}
        for k, (m, items) in enumerate(chunks):
            for i in items:
                for n in i.names:
                    if (m.name, n) not in self.dedupe:
                        place_of.setdefault(self.renames.get((m.name, n), n), (k, i))
        emitted = set()

        def emit(k, i, trail=()):
            if id(i) in emitted or id(i) in trail:
                return
            m = chunks[k][0]
            if i.node is not None and i.kind in ("def", "other"):
                for r in sorted(
                    eval_names(i.node),
                    key=lambda r: (
                        getattr(place_of.get(self.local_name(m, r, target)), "__getitem__", lambda _: 0)(0),
                        r,
                    ),
                ):
                    where = place_of.get(self.local_name(m, r, target) or "")
                    if where and where[1] is not i:
                        emit(*where, (*trail, id(i)))
            emitted.add(id(i))
            sequence.append((k, i))

        done, rest = [], list(range(len(chunks)))
        while rest:
            ready = next((k for k in rest if needs[k] <= set(done)), None)
            if ready is None:
                say(
                    f"ORDER in {target}: {[(chunks[k][0].name, [chunks[j][0].name for j in needs[k] if j not in done]) for k in rest]}"
                )
                ready = rest[0]
            for i in chunks[ready][1]:
                emit(ready, i)
            done.append(ready)
            rest.remove(ready)
        doc = ""
        for m, _ in chunks:
            if m.name == main:
                i = m.items[0]
                if i.kind == "doc":
                    doc = self.new_text("".join(m.lines[i.start : i.end]).lstrip("\n"))
        body, edits, titled = [], {k: self.edits(chunks[k][0], target, False) for k in done}, set()
        for place, (k, i) in enumerate(sequence):
            m, items = chunks[k]
            first = items[0] is i
            if self.plan.get("headings", True) and k not in titled and first and not (place == 0 and m.name == main):
                body.append(self.heading(m, m.name != main and self.default(m.name) == target, target))
            if first:
                titled.add(k)
            if any((m.name, n) in self.dedupe for n in i.names):
                continue
            text = self.apply(m.text, edits[k], m.offsets[i.start], m.offsets[i.end])
            before = sequence[place - 1] if place else None
            glued = before is not None and before[0] == k and before[1].end == i.start and body
            if glued:
                body[-1] += text.rstrip("\n") + "\n"
            else:
                body.append(text.strip("\n") + "\n")
        return f"{doc}\n{head}\n\n" + "\n\n".join(body)

    def has_as(self, node, b):
        return any(a.asname == b for a in node.names)

    rel: set = set()

    def local_name(self, m, name, target):
        alias, _, attr = name.partition(".")
        if attr:
            if alias not in m.imported or m.imported[alias][1] is None:
                return None
            full = ".".join(m.imported[alias])
            found = self.resolve(full, attr) if full in self.modules else None
            return found[1] if found and found[0] == target else None
        found = self.resolve(m.name, name)
        return found[1] if found and found[0] == target else None

    def heading(self, m, with_doc, target):
        stem = m.name.rpartition(".")[2].replace("_hfllm", "").replace("_", " ")
        rel, short = m.rel.removeprefix(PKG + "/"), target.removeprefix(PKG + ".").replace(".", "/") + ".py"
        titles = self.plan.get("titles", {})
        for stage in (
            "constitution",
            "federated",
            "evaluate",
            "pretrain",
            "sft",
            "rlhf",
            "tools",
            "ground",
            "reason",
            "vision",
            "quantize",
            "reward",
            "distill",
            "extend",
            "classify",
            "expert_iteration",
            "scaling",
        ):
            if rel.startswith(("stages/", "evaluation/")) and short.startswith(f"stages/{stage}"):
                stem = stem.removeprefix(stage.replace("_", " ") + " ") or stem
        text = f"# ---- {titles.get((rel, short), titles.get(rel, stem))} ----\n"
        i = m.items[0]
        if with_doc and i.kind == "doc":
            doc = ast.get_docstring(m.tree, clean=True)
            text += "#\n" + "".join(f"# {line}".rstrip() + "\n" for line in wrapped(self.new_text(doc)))
        return text

    # ---- other texts ----

    def texts(self):
        out = {}
        listed = subprocess.run(
            ["git", "ls-files", *TEXTS], cwd=self.repo, capture_output=True, text=True
        ).stdout.split("\n")
        for rel in filter(None, listed):
            p = self.repo / rel
            if rel == ".ci/faults.yaml" or rel == "CHANGELOG.md":
                continue
            old = p.read_text(encoding="utf-8")
            new = self.new_text(old)
            if new != old:
                out[rel] = new
        return out


def faults(repo, new_module_of):
    import yaml

    path = repo / ".ci/faults.yaml"
    text = path.read_text()
    rows = yaml.safe_load(text)
    files = {p.relative_to(repo).as_posix(): p.read_text() for p in (repo / "hfllm").rglob("*.py")}
    for row in rows:
        if row["file"] in files and files[row["file"]].count(row["old"]) == 1:
            continue
        new = new_module_of(row["file"])
        hits = [f for f, t in files.items() if t.count(row["old"]) == 1]
        if new in hits:
            hits = [new]
        if len(hits) != 1:
            say(f"fault {row['name']}: {row['file']} -> {hits} ({new}: {files.get(new, '').count(row['old'])})")
            continue
        at = [m for m in re.finditer(r"^(?:- |  )file: (.*)$", text, re.M)][rows.index(row)]
        assert at[1] == row["file"], (at[1], row)
        text = text[: at.start(1)] + hits[0] + text[at.end(1) :]
    path.write_text(text)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("repo", type=Path)
    p.add_argument("plan", type=Path)
    p.add_argument("--dry", action="store_true")
    a = p.parse_args()
    plan = runpy.run_path(str(a.plan))["PLAN"]
    mover = Mover(a.repo, plan)
    new_files, gone = mover.run()
    texts = mover.texts()
    print("\n".join(dict.fromkeys(problems)))
    print(f"{len(new_files)} files written, {len(gone)} removed, {len(texts)} texts; assembled {len(mover.assembled)}")
    if a.dry:
        return
    problems.clear()
    for t, sources in plan["moves"].items():
        new, old = f"{PKG}/{t}", f"{PKG}/{sources[0]}"
        if new != old and (a.repo / old).exists() and not (a.repo / new).exists() and old in gone:
            (a.repo / new).parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["git", "mv", old, new], cwd=a.repo, check=True)
    for rel, text in {**new_files, **texts}.items():
        (a.repo / rel).parent.mkdir(parents=True, exist_ok=True)
        (a.repo / rel).write_text(text, encoding="utf-8")
    for rel in gone:
        if (a.repo / rel).exists():
            subprocess.run(["git", "rm", "-qf", rel], cwd=a.repo, check=True)
    py = [rel for rel in new_files if rel.endswith(".py")]
    ruff = str(a.repo / ".venv/bin/ruff")
    if not Path(ruff).exists():
        ruff = "ruff"
    subprocess.run([ruff, "check", "-q", "--fix", "--select", "I,F401", *py], cwd=a.repo)
    subprocess.run([ruff, "format", "-q", *py], cwd=a.repo)
    if "post" not in plan:
        subprocess.run(
            [ruff, "check", "-q", "--output-format", "concise", "hfllm", "recipes", "tests", "benchmarks"], cwd=a.repo
        )
    if "post" in plan:
        plan["post"](a.repo)
        subprocess.run([ruff, "check", "-q", "--fix", "--select", "I,F401", *py], cwd=a.repo)
        subprocess.run([ruff, "format", "-q", *py], cwd=a.repo)
        subprocess.run(
            [ruff, "check", "-q", "--output-format", "concise", "hfllm", "recipes", "tests", "benchmarks"], cwd=a.repo
        )
    faults(a.repo, lambda f: mover.default(mover.mod(f)).replace(".", "/") + ".py")
    for rel in new_files:
        n = len((a.repo / rel).read_text().splitlines())
        if rel.startswith("hfllm") and n > 800:
            say(f"{rel} has {n} lines")
    print("\n".join(problems))


main()
