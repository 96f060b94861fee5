"""Take pictures of the page of the walkthrough in Chromium: wide, dark, and on a phone.

python docs/make_screenshots.py PAGE.html FOLDER          (PAGE.html: from walkthrough --html)

Needs chromium, chromedriver and selenium. Prints the time in which each step is drawn.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

WINDOWS = {"wide": (1200, 900, "light"), "dark": (1200, 900, "dark"), "phone": (360, 740, "light")}
TALLEST = 2600  # pixels
# Draws a step and forces a layout -> milliseconds, height of the page.
DRAW = """
const before = performance.now();
document.querySelector(`[data-step='${arguments[0]}']`).click();
const height = document.documentElement.scrollHeight;
return [performance.now() - before, height];
"""


def chromium() -> Chrome:
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    return Chrome(options=options, service=Service(shutil.which("chromedriver")))


def resize(driver: Chrome, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def photograph(driver: Chrome, page: Path, folder: Path, name: str) -> None:
    width, height, scheme = WINDOWS[name]
    colors = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", colors)
    resize(driver, width, height)
    driver.get(page.absolute().as_uri())
    for step in range(len(driver.find_elements("css selector", "[data-step]"))):
        taken, full = driver.execute_script(DRAW, step)
        resize(driver, width, min(full, TALLEST))
        driver.execute_async_script("setTimeout(arguments[0], 500)")  # animations end
        driver.save_screenshot(str(folder / f"{name}-{step:02}.png"))
        resize(driver, width, height)
        print(f"{name} {step:2}: {taken:4.0f} ms")


def main() -> None:
    page, folder = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    driver = chromium()
    for name in WINDOWS:
        photograph(driver, page, folder, name)
    driver.quit()


if __name__ == "__main__":
    main()
