"""Checks of a page's accessibility by axe, the engine that browsers' own audits use."""

WIDTHS = {"a phone": (390, 844), "a desk": (1280, 800)}
AT_REST = """async () => {
    for (let frame = 0; frame < 3; frame++) await new Promise(requestAnimationFrame);
    const ending = (animation) => animation.effect.getComputedTiming().endTime < Infinity;
    await Promise.allSettled(document.getAnimations().filter(ending).map((animation) => animation.finished));
}"""


def assert_accessible(page) -> None:
    """No finding of axe is serious or critical, on light and on dark ground, at the width of a phone and of a desk."""
    from axe_playwright_python.sync_playwright import Axe

    found = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for name, (width, height) in WIDTHS.items():
            page.set_viewport_size({"width": width, "height": height})
            page.evaluate(AT_REST)  # colours change gradually
            for violation in Axe().run(page).response["violations"]:
                if violation["impact"] in ("serious", "critical"):
                    targets = [node["target"] for node in violation["nodes"][:3]]
                    found.append(f"{scheme}, {name}: {violation['id']}: {violation['help']}: {targets}")
    assert not found, "\n".join(found)
