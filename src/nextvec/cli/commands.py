"""Imports every module that registers verbs on the app, in the order in which help lists them."""

from nextvec.cli import generate as generate

from nextvec.cli import data as data
