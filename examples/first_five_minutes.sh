#!/bin/sh
# The first five minutes with sana: no GPU, no network, nothing but the installed package.
# Draws into a new folder under the current one and stops at the first thing that is not as promised.
set -eu
folder=$(mktemp -d ./sana-first-steps.XXXXXX)
cd "$folder"

echo '$ sana'
sana

echo '$ sana "a red fish above a yellow boat"'
picture=$(sana "a red fish above a yellow boat")
test -s "$picture"

echo "\$ sana info $picture"
sana info "$picture" | tee info.txt
grep -q "a red fish above a yellow boat" info.txt

echo "\$ sana replay $picture"
sana replay "$picture" | tee replay.txt
grep -q identical replay.txt

echo '$ sana "three blue hearts" --seed 1-2 -o hearts/'
sana "three blue hearts" --seed 1-2 -o hearts/
test "$(find hearts -name '*.png' | wc -l)" -eq 2

echo '$ sana doctor'
sana doctor

echo "It all works. The pictures are in $folder."
