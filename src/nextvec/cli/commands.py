"""Imports every module that registers verbs on the app, in the order in which help lists them."""
