"""Where AppPot keeps things on the host.  Nothing here creates a directory."""

from __future__ import annotations

import os
from collections.abc import Mapping

# The folder that holds `host` and `guest`: the source tree, or the installed package.
_PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))


def data_home(env: Mapping[str, str] = os.environ) -> str:
    """The user's store: pot and images ($XDG_DATA_HOME/apppot)."""
    root = env.get("XDG_DATA_HOME") or os.path.join(env.get("HOME", "/"), ".local", "share")
    return os.path.join(root, "apppot")


def cache_home(env: Mapping[str, str] = os.environ) -> str:
    """What can be made again: downloads, build trees, probe results ($XDG_CACHE_HOME/apppot)."""
    root = env.get("XDG_CACHE_HOME") or os.path.join(env.get("HOME", "/"), ".cache")
    return os.path.join(root, "apppot")


def state_home(env: Mapping[str, str] = os.environ) -> str:
    """What runs leave behind: records, logs ($XDG_STATE_HOME/apppot)."""
    root = env.get("XDG_STATE_HOME") or os.path.join(env.get("HOME", "/"), ".local", "state")
    return os.path.join(root, "apppot")


def config_files(env: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Configuration files, the site's before the user's, which overrides it."""
    root = env.get("XDG_CONFIG_HOME") or os.path.join(env.get("HOME", "/"), ".config")
    return ("/etc/apppot.toml", os.path.join(root, "apppot", "config.toml"))


def pot_homes(env: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Where a pot may be, in the order they are searched; the first is written to.

    $APPPOT_POT alone, where it is set; else the user's store, the installed package (a release
    may bring a pot along), the site's store.
    """
    if env.get("APPPOT_POT"):
        return (env["APPPOT_POT"],)
    return tuple(os.path.join(place, "pot") for place in (data_home(env), _PACKAGE, _site(env)))


def pot_home(env: Mapping[str, str] = os.environ) -> str:
    """The pot that is built and imported into."""
    return pot_homes(env)[0]


def image_stores(env: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Image stores in the order they are searched: the site's (read-only), then the user's."""
    return (os.path.join(_site(env), "images"), os.path.join(data_home(env), "images"))


def _site(env: Mapping[str, str]) -> str:
    return env.get("APPPOT_SITE_STORE", "/var/lib/apppot")


def recipe_homes(env: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Where recipes are looked for: $APPPOT_RECIPES, then the source tree or the package."""
    places = (
        env.get("APPPOT_RECIPES", ""),
        os.path.join(_PACKAGE, "image-recipes"),
        os.path.join(_PACKAGE, "recipes"),
    )
    return tuple(place for place in places if place)
