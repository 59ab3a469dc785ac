"""The results of the benchmark as Markdown and as a plot."""

import re

# What takes its turn; of instar, in which sandbox. The default one has the program's name.
SANDBOXES = {"instar": "kvm", "process": "process"}
PROGRAMS = (*SANDBOXES, "qemu-img")
MARKS = ("<!-- bench:begin -->", "<!-- bench:end -->")
WAYS = {"shared": "shared", "kernel": "in the kernel", "host": "through the host", "guest": "through the guest"}


def seconds(value):
    """A time for people."""
    return f"{value * 1e3:.1f} ms" if value < 0.5 else f"{value:.2f} s"


def span(numbers):
    """`median (min–max)` in milliseconds or seconds; nothing for what was not measured."""
    if not numbers:
        return "–"
    if numbers["median"] < 0.5:
        return f"{numbers['median'] * 1e3:.1f} ms ({numbers['min'] * 1e3:.1f}–{numbers['max'] * 1e3:.1f})"
    return f"{numbers['median']:.2f} s ({numbers['min']:.2f}–{numbers['max']:.2f})"


def amount(value):
    """Bytes for people."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value} B"


def ways(moved):
    """The bytes by the way they took; what is below a hundredth of all is left out."""
    total = sum(moved.values())
    parts = [f"{amount(moved[way])} {name}" for way, name in WAYS.items() if moved.get(way, 0) * 100 > total]
    return ", ".join(parts)


def heading(where):
    """What was measured, and where."""
    nested = "KVM inside another virtual machine" if where["kvm_is_nested"] else "KVM on bare metal"
    options = where["mount_options"]
    return (
        f"{where['date'][:10]}, revision {where['revision']}; {where['qemu_img']}; {where['cpu']}, {where['cpus']} "
        f"processors, {nested}; Linux {where['kernel']}, {where['file_system']} ({options}); at least {where['runs']} runs of each, "
        "median (min–max) of the wall time of the whole process."
    )


def table(report):
    """The workloads."""
    titles = (
        "workload", "instar", "in a process", "qemu-img", "instar / qemu-img", "goal", "process / qemu-img", "process / instar",
        "exits, instar / process", "bytes, by their way", "peak memory, instar / process / qemu-img",
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for result in report["results"]:
        numbers = [result["programs"].get(program) for program in PROGRAMS]
        exits = (result["programs"][program]["exits"] for program in SANDBOXES)
        ratios = [f"{result[key]:.2f}" if result[key] else "" for key in ("ratio", "process_ratio", "process_over_kvm")]
        goal = f"≤ {result['goal']}" if result["goal"] else ""
        cells = (
            result["title"], *map(span, numbers), ratios[0], goal, *ratios[1:],
            " / ".join("?" if count is None else f"{count:,}" for count in exits),
            ways(result["bytes"]),
            " / ".join(f"{each['peak_rss_kib'] / 1024:.0f}" if each else "–" for each in numbers) + " MiB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def kernel_table(report):
    """Against what the kernel alone needs."""
    lines = [
        "| workload | kernel: copy and flush | kernel: give back and flush | instar | instar / all of the kernel's | goal |",
        "|---|---|---|---|---|---|",
    ]
    for result in report["results"]:
        kernel, ours = result["kernel"], result["programs"]["instar"]["median"]
        if kernel:
            ratio = ours / sum(kernel.values())
            goal = f"≤ {result['kernel_goal']}" if result["kernel_goal"] else ""
            cells = (result["title"], seconds(kernel["copy"]), seconds(kernel["empty"]), seconds(ours), f"{ratio:.2f}", goal)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def growth_tables(growth):
    """How cost grows."""
    titles = {
        "data": "data that fills the disk",
        "mapped": "mapped by the overlay's tables, as holes of its file",
        "size": "virtual size, with 64 MiB scattered over it",
        "extents": "writes of 4 KiB in random order, an extent each",
    }
    parts = []
    for name, title in titles.items():
        lines = [f"| {title} | time | exits | peak memory |", "|---|---|---|---|"]
        for point in growth[name]:
            memory = f"{point['peak_rss_kib'] / 1024:.0f} MiB"
            lines.append(f"| {point['title']} | {seconds(point['seconds'])} | {point['exits']:,} | {memory} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def markdown(report):
    """All tables."""
    parts = [heading(report["machine"])]
    if report["results"]:
        parts.append(table(report))
    if any(result["kernel"] for result in report["results"]):
        parts.append(kernel_table(report))
    if "growth" in report:
        parts.append(growth_tables(report["growth"]))
    return "\n\n".join(parts)


def write_docs(report, docs):
    """The tables between the marks in performance.md, and the plot beside it."""
    write_part(docs / "performance.md", MARKS, markdown(report))
    plot(report, docs / "performance.svg")


def write_part(page, marks, body):
    """Replace what stands between two marks of a page."""
    begin, end = marks
    body = f"{begin}\n\n{body}\n\n{end}"
    found, count = re.subn(f"{re.escape(begin)}.*{re.escape(end)}", lambda _: body, page.read_text("utf-8"), flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"bench: {page} has no {begin} … {end}")
    page.write_text(found, encoding="utf-8")


def plot(report, path):
    """The ratios as bars, with the goals."""
    import matplotlib

    matplotlib.use("svg")
    # The same bytes from the same numbers.
    matplotlib.rcParams["svg.hashsalt"] = "instar"
    from matplotlib import pyplot

    results = [result for result in reversed(report["results"]) if result["ratio"]]
    figure, axes = pyplot.subplots(figsize=(9, 0.55 * len(results) + 1.2), layout="constrained")
    places = range(len(results))
    for key, name, color, shift in (("ratio", "virtual machine", "#4878a8", 0.19), ("process_ratio", "process", "#a0b8d0", -0.19)):
        ratios = [result[key] for result in results]
        bars = axes.barh([place + shift for place in places], ratios, color=color, height=0.36, label=name)
        axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=3, fontsize=7)
    axes.legend(title="sandbox", fontsize=8, title_fontsize=8, loc="lower right")
    for place, result in zip(places, results):
        if result["goal"]:
            axes.plot([result["goal"]] * 2, [place - 0.42, place + 0.42], color="#c04030", linewidth=2)
    axes.axvline(1, color="#888888", linewidth=1, linestyle="--")
    axes.set_yticks(list(places), [result["title"] for result in results], fontsize=8)
    axes.set_xlabel("wall time, instar / qemu-img commit (red: the goal; dashed: as fast as qemu-img)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
