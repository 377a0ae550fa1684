#!/bin/bash
# What README.md and docs/ claim holds: the quick start runs and prints what it is said to print, options and commands
# that are named exist, relative links lead somewhere. Usage: test_readme.sh BUILD_FOLDER SOURCE_FOLDER
#
# README.md's blocks marked sh run as one script, in a folder that has build/ and tests/ as the source folder does.
# Each line of its blocks marked text must be in the output; numbers, spaces and the folder of a path may differ.
set -euo pipefail
export LC_ALL=C

build=$1 source=$2
status=0
dir=$(mktemp -d "${TMPDIR:-/tmp}/kvg-readme.XXXXXX")
daemons=()

clean_up() {
	for pid in "${daemons[@]}"; do
		kill -KILL "$pid" 2>/dev/null || true
	done
	rm -rf -- "$dir"
}
trap clean_up EXIT

complain() {
	echo "$*" >&2
	status=1
}

# The lines of a file's fenced blocks with that mark; of all blocks when the mark is '*'.
blocks() {
	awk -v mark="$2" '
		/^[ \t]*```/ {
			inside = !inside
			wanted = inside && (mark == "*" || $0 ~ "^[ \t]*```" mark "[ \t]*$")
			next
		}
		inside && wanted' "$1"
}

# ---- the quick start ----

normal() {
	sed -E -e 's,/[^ ]*/,DIR/,g' -e 's,[0-9]+(\.[0-9]+)?,N,g' -e 's,[ \t]+, ,g' -e 's,^ | $,,g'
}

run_quick_start() {
	local count=0 line

	mkdir "$dir/top" "$dir/tmp"
	ln -s "$build" "$dir/top/build"
	ln -s "$source/tests" "$dir/top/tests"
	{
		echo 'set -euo pipefail; trap "jobs -p >\"\$TMPDIR/../left\"" EXIT'
		blocks "$source/README.md" sh
	} >"$dir/script"
	(cd "$dir/top" && TMPDIR="$dir/tmp" timeout 200 bash "$dir/script") >"$dir/output" 2>&1 ||
		complain "README.md: its quick start ends with status $?"
	[[ ! -e $dir/left ]] || mapfile -t daemons <"$dir/left"
	((${#daemons[@]} == 0)) || complain "README.md: its quick start leaves processes: ${daemons[*]}"
	[[ -z $(ls -A "$dir/tmp") ]] || complain "README.md: its quick start leaves files: $(ls -A "$dir/tmp")"
	normal <"$dir/output" >"$dir/normal"
	while IFS= read -r line; do
		[[ $line ]] || continue
		count=$((count + 1))
		grep -qxF -- "$line" "$dir/normal" || complain "README.md: the quick start does not print: $line"
	done < <(blocks "$source/README.md" text | normal)
	((count > 0)) || complain "README.md: no block of text to compare"
	((status == 0)) || cat -- "$dir/output" >&2
}

# ---- options and commands ----

# Code in a file: lines of blocks with their continuations joined, and `spans` elsewhere.
code() {
	blocks "$1" '*' | sed -e ':a' -e '/\\$/N; s/\\\n//; ta'
	awk '/^[ \t]*```/ { inside = !inside; next } !inside' "$1" | tr '\n' ' ' | grep -oE '`[^`]+`' | tr -d '`' || true
}

# Code to lines "program word": each option with the program before it ("any" when nothing is before it), and the
# word that follows kvgatectl or kvgate-bench at once. What other programs are given is left out.
uses() {
	awk '{
		gsub(/\||;|&&|\|\|/, " ; ")
		program = "any"
		for (i = 1; i <= NF; i++) {
			word = $i
			sub(/^.*\//, "", word)
			if ($i == ";")
				program = "any"
			else if (word ~ /^(kvgated|kvgatectl|kvgate-lm|kvgate-bench)$/)
				program = word
			else if ($i == "tools/demo" || $i == "tests/run")
				program = $i
			else if ($i ~ /^--[a-z]/) {
				option = $i
				sub(/[^-a-z].*$/, "", option)
				if (program != "other")
					print program, option
			} else if (program == "any")
				program = "other"
			else if ((program == "kvgatectl" || program == "kvgate-bench") && word ~ /^[a-z][-a-z]*$/ &&
				$(i - 1) ~ "(^|/)" program "$")
				print program, word
		}
	}'
}

save_help() {
	local program

	for program in kvgated kvgatectl kvgate-lm kvgate-bench; do
		"$build/bin/$program" --help >"$dir/help.$program"
	done
	for program in tools/demo tests/run; do
		"$source/$program" --help >"$dir/help.${program#*/}"
	done
	cat "$dir"/help.* >"$dir/all"
	mv "$dir/all" "$dir/help.any"
}

check_uses() {
	local file=$1 program word

	while read -r program word; do
		checked=$((checked + 1))
		grep -qE -- "(^|[^-a-z])$word([^-a-z]|$)" "$dir/help.${program#*/}" ||
			complain "${file#"$source/"}: $program has no '$word'"
	done < <(code "$file" | uses | sort -u)
}

# ---- links ----

check_links() {
	local file=$1 link

	while IFS= read -r link; do
		links=$((links + 1))
		[[ -e $(dirname "$file")/$link ]] || complain "${file#"$source/"}: the link to $link leads nowhere"
	done < <(tr '\n' ' ' <"$file" | grep -oE '\]\([^)# ]+' | sed 's/^](//' | grep -vE '^[a-z]+:' || true)
}

checked=0 links=0
run_quick_start
save_help
for file in "$source"/*.md "$source"/docs/*.md; do
	check_uses "$file"
	check_links "$file"
done
((checked >= 20)) || complain "only $checked options found: is the search for them broken?"
((links >= 10)) || complain "only $links links found: is the search for them broken?"
((status == 0)) && echo "quick start, $checked options and commands, $links links: all hold"
exit "$status"
