"""Where AppPot keeps things on the host.  Nothing here creates a directory."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping


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


def pot_home(env: Mapping[str, str] = os.environ) -> str:
    """The pot's directory: $APPPOT_POT, else pot/ in the user's store."""
    return env.get("APPPOT_POT") or os.path.join(data_home(env), "pot")


def image_stores(env: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Image stores in the order they are searched: the site's (read-only), then the user's."""
    site = env.get("APPPOT_SITE_STORE", "/var/lib/apppot")
    return (os.path.join(site, "images"), os.path.join(data_home(env), "images"))


def recipe_homes(env: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Where recipes are looked for: $APPPOT_RECIPES, the source tree, the installation."""
    tree = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    places = (
        env.get("APPPOT_RECIPES", ""),
        os.path.join(tree, "image-recipes"),
        os.path.join(sys.prefix, "share", "apppot", "recipes"),
    )
    return tuple(place for place in places if place)
