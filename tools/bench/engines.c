/*
 * kvgate-bench engines: hands over to the Python program that measures transformers on kvgate. It is found in the
 * source tree that this was built in; KVG_ENGINES names another script, KVG_PYTHON the interpreter.
 */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tools/bench/bench.h"

#define PATH_BYTES 4096

/* From the folder of this program, which is bin of a build folder of the source tree. */
#define SCRIPT "../../tools/bench/engines/main.py"

/* The folder of this program, or "" where /proc does not say. */
static void own_folder(char ret[PATH_BYTES])
{
	ssize_t n = readlink("/proc/self/exe", ret, PATH_BYTES - 1);
	char *slash;

	ret[n > 0 ? n : 0] = '\0';
	slash = strrchr(ret, '/');
	if (slash)
		*slash = '\0';
}

/* The script, or -ENOENT after saying where it was looked for. */
static int find_script(const char *folder, char ret[PATH_BYTES])
{
	const char *named = getenv("KVG_ENGINES");

	if (named)
		(void)snprintf(ret, PATH_BYTES, "%s", named);
	else
		(void)snprintf(ret, PATH_BYTES, "%.4000s/%s", folder, SCRIPT);
	if (access(ret, R_OK) == 0)
		return 0;
	(void)fprintf(stderr, "kvgate-bench: engines: %s: %s: KVG_ENGINES can name the script\n", ret, strerror(errno));
	return -ENOENT;
}

/* python3 SCRIPT --programs FOLDER ARGUMENTS...: a later --programs of the user's counts. */
static int run_script(const char *script, const char *folder, int argc, char **argv)
{
	const char *python = getenv("KVG_PYTHON"), **words = calloc((size_t)argc + 5, sizeof(*words));
	size_t count = 0;

	if (!words) {
		(void)fprintf(stderr, "kvgate-bench: engines: no memory\n");
		return BENCH_FAIL;
	}
	words[count++] = python ? python : "python3";
	words[count++] = script;
	words[count++] = "--programs";
	words[count++] = folder;
	for (int i = 1; i < argc; i++)
		words[count++] = argv[i];
	(void)execvp(words[0], (char *const *)(uintptr_t)words);
	(void)fprintf(stderr, "kvgate-bench: engines: %s: %s: it needs Python 3.11 with torch and transformers\n",
		words[0], strerror(errno));
	free(words);
	return BENCH_SKIP;
}

int bench_engines(int argc, char **argv)
{
	char folder[PATH_BYTES], script[PATH_BYTES];

	own_folder(folder);
	if (find_script(folder, script) < 0)
		return BENCH_SKIP;
	return run_script(script, folder, argc, argv);
}
