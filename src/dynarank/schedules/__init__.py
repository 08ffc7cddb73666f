"""Schedules: when ranks change and when they freeze. One file each, found by discovery."""
