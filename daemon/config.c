#include "daemon/config.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <ini.h>
#include <pwd.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>
#include <unistd.h>

#include "daemon/base/cleanup.h"
#include "proto/size.h"

#define FILE_MAX_BYTES  (1u << 20)
#define EXTENT_MIN      (UINT64_C(64) << 10)
#define EXTENT_DEFAULT  (UINT64_C(256) << 10) /* at least */
#define EXTENT_MIN_CUDA (UINT64_C(2) << 20)   /* what GPUs map at least */
#define EXTENT_MAX      (UINT64_C(1) << 30)
#define EXTENT_COUNT    2000 /* about, when the size is ours to choose */

/* A GPU takes as long to create and export a large extent as a small one: fewer, up to a size that still returns well.
 */
#define EXTENT_COUNT_CUDA 512
#define EXTENT_LARGE_CUDA (UINT64_C(64) << 20)
#define SPIN_US_DEFAULT   50
#define SPIN_US_MAX       1000000
#define WAIT_MS_DEFAULT   10000
#define WAIT_MS_MAX       600000
#define PRESSURE_MS       10000
#define PRESSURE_MS_MAX   600000
#define INDEX_MAX         1023
#define SEQUENCES_MAX     1000000000u
#define ENTRIES_MAX       4194304u /* of all workers' rings */
#define TENANT_NAME_MAX   64
#define SOCKET_MAX        (sizeof(((struct sockaddr_un *)NULL)->sun_path) - 1)
#define PASSWD_BUFFER     16384
#define SECTION_MAX       128
#define KEY_DEVICE_SIZE   0 /* of keys[] */
#define KEY_EXTENT_SIZE   1
#define KEY_INDEX         2
#define KEY_BUDGETS       3 /* min, high, max of each tier */
#define KEYS              32
#define SPACES            " \t\r\v\f"
#define ARRAY_SIZE(a)     (sizeof(a) / sizeof((a)[0]))

enum section { SECTION_NONE, SECTION_POOL, SECTION_DAEMON, SECTION_ADMIN, SECTION_TENANT };

/* Where each thing stood, for messages; 0: not there. */
struct tenant_lines {
	unsigned name;
	unsigned keys[KEYS]; /* of keys[] */
};

/*
 * inih splits keys from values; the sections are read here, because inih cuts their
 * names at 49 bytes and does not tell of an empty or a repeated one.
 */
struct parser {
	const char *path;
	const char *at; /* the rest of the file, which ends with a NUL */
	unsigned line;
	int error;
	char *text;
	enum section section;
	unsigned seen[KEYS]; /* the same of the sections that are no tenant's */
	struct tenant_lines *lines;
	struct config config;
};

static void __attribute__((format(printf, 3, 4))) fail(struct parser *parser, int error, const char *format, ...)
{
	va_list args;
	int n;

	if (parser->error)
		return;
	parser->error = error;
	n = parser->line ? snprintf(parser->text, CONFIG_TEXT, "%s:%u: ", parser->path, parser->line)
			 : snprintf(parser->text, CONFIG_TEXT, "%s: ", parser->path);
	if (n < 0 || n >= CONFIG_TEXT)
		return;
	va_start(args, format);
	(void)vsnprintf(parser->text + n, CONFIG_TEXT - (size_t)n, format, args);
	va_end(args);
}

static struct config_tenant *last_tenant(struct parser *parser)
{
	return &parser->config.tenants[parser->config.tenant_count - 1];
}

static struct tenant_lines *last_lines(struct parser *parser)
{
	return &parser->lines[parser->config.tenant_count - 1];
}

static void set_size(struct parser *parser, const char *key, const char *value, uint64_t *ret)
{
	int r = kvg_size_parse(value, ret);

	if (r == -ERANGE)
		fail(parser, -EINVAL, "%s: '%s' is more than the limit, 4 EiB", key, value);
	else if (r < 0)
		fail(parser, -EINVAL, "%s: '%s' is not a size such as 4096, 64K, 512M or 1.5G", key, value);
}

static void set_device_size(struct parser *parser, const char *key, const char *value)
{
	set_size(parser, key, value, &parser->config.device_size);
}

static void set_extent_size(struct parser *parser, const char *key, const char *value)
{
	uint64_t size = 0;

	set_size(parser, key, value, &size);
	if (size < EXTENT_MIN || size > EXTENT_MAX || (size & (size - 1)))
		fail(parser, -EINVAL, "%s: '%s' is not a power of two from 64 KiB to 1 GiB", key, value);
	parser->config.extent_size = size;
}

/* A number in decimal, all of the text. */
static bool parse_number(const char *text, uint64_t max, uint64_t *ret)
{
	size_t length = strlen(text);

	if (length == 0 || length > 18 || strspn(text, "0123456789") != length)
		return false;
	*ret = strtoull(text, NULL, 10);
	return *ret <= max;
}

static void set_number(
	struct parser *parser, const char *key, const char *value, uint32_t least, uint32_t most, uint32_t *ret)
{
	uint64_t number;

	if (parse_number(value, most, &number) && number >= least)
		*ret = (uint32_t)number;
	else
		fail(parser, -EINVAL, "%s: '%s' is not a number from %u to %u", key, value, least, most);
}

static void set_spin_us(struct parser *parser, const char *key, const char *value)
{
	set_number(parser, key, value, 0, SPIN_US_MAX, &parser->config.spin_us);
}

static void set_wait_ms(struct parser *parser, const char *key, const char *value)
{
	set_number(parser, key, value, 1, WAIT_MS_MAX, &parser->config.wait_ms);
}

static void set_pressure_ms(struct parser *parser, const char *key, const char *value)
{
	set_number(parser, key, value, 1, PRESSURE_MS_MAX, &parser->config.pressure_ms);
}

static void set_host_size(struct parser *parser, const char *key, const char *value)
{
	set_size(parser, key, value, &parser->config.host_size);
}

static void set_device_index(struct parser *parser, const char *key, const char *value)
{
	set_number(parser, key, value, 0, INDEX_MAX, &parser->config.device_index);
}

/* Whether the value is the second of two words. */
static bool parse_choice(
	struct parser *parser, const char *key, const char *value, const char *first, const char *second)
{
	bool is_second = strcmp(value, second) == 0;

	if (!is_second && strcmp(value, first) != 0)
		fail(parser, -EINVAL, "%s: '%s' is neither %s nor %s", key, value, first, second);
	return is_second;
}

static void set_kind(struct parser *parser, const char *key, const char *value)
{
	parser->config.kind = parse_choice(parser, key, value, "host", "cuda") ? CONFIG_CUDA : CONFIG_HOST;
}

static void set_isolation(struct parser *parser, const char *key, const char *value)
{
	parser->config.isolation = parse_choice(parser, key, value, "shared", "strict") ? CONFIG_STRICT : CONFIG_SHARED;
}

static void set_ipc(struct parser *parser, const char *key, const char *value)
{
	last_tenant(parser)->ipc = parse_choice(parser, key, value, "no", "yes");
}

static void set_string(struct parser *parser, const char *key, const char *value, char **ret)
{
	char *copy;

	if (value[0] == '\0') {
		fail(parser, -EINVAL, "%s: the value is empty", key);
		return;
	}
	copy = strdup(value);
	if (!copy)
		fail(parser, -ENOMEM, "%s: out of memory", key);
	else
		*ret = copy;
}

static void set_budgets_dir(struct parser *parser, const char *key, const char *value)
{
	set_string(parser, key, value, &parser->config.budgets_dir);
}

static void set_socket(struct parser *parser, const char *key, const char *value, char **ret)
{
	if (strlen(value) > SOCKET_MAX)
		fail(parser, -EINVAL, "%s: '%s' has %zu bytes, more than the %zu of a socket's path", key, value,
			strlen(value), SOCKET_MAX);
	else
		set_string(parser, key, value, ret);
}

static void set_mode(struct parser *parser, const char *key, const char *value, mode_t *ret)
{
	size_t length = strlen(value);

	if (length == 0 || length > 4 || strspn(value, "01234567") != length || strtoul(value, NULL, 8) > 0777)
		fail(parser, -EINVAL, "%s: '%s' is not an octal mode from 0 to 0777", key, value);
	else
		*ret = (mode_t)strtoul(value, NULL, 8);
}

static void set_admin_socket(struct parser *parser, const char *key, const char *value)
{
	set_socket(parser, key, value, &parser->config.admin_socket);
}

static void set_admin_mode(struct parser *parser, const char *key, const char *value)
{
	set_mode(parser, key, value, &parser->config.admin_mode);
}

static void set_admin_group(struct parser *parser, const char *key, const char *value)
{
	char buffer[PASSWD_BUFFER];
	struct group group, *found = NULL;

	(void)getgrnam_r(value, &group, buffer, sizeof(buffer), &found);
	if (found)
		set_string(parser, key, value, &parser->config.admin_group);
	else
		fail(parser, -EINVAL, "%s: there is no group '%s'", key, value);
}

static void set_tenant_socket(struct parser *parser, const char *key, const char *value)
{
	set_socket(parser, key, value, &last_tenant(parser)->socket);
}

static void set_tenant_mode(struct parser *parser, const char *key, const char *value)
{
	set_mode(parser, key, value, &last_tenant(parser)->mode);
}

static struct budget *last_budget(struct parser *parser, const char *key)
{
	return &last_tenant(parser)->budgets[key[0] == 'h' ? TENANT_HOST : TENANT_DEVICE];
}

static void set_min(struct parser *parser, const char *key, const char *value)
{
	set_size(parser, key, value, &last_budget(parser, key)->min);
}

static void set_high(struct parser *parser, const char *key, const char *value)
{
	set_size(parser, key, value, &last_budget(parser, key)->high);
}

static void set_max(struct parser *parser, const char *key, const char *value)
{
	set_size(parser, key, value, &last_budget(parser, key)->max);
}

static void set_max_connections(struct parser *parser, const char *key, const char *value)
{
	set_number(parser, key, value, 1, META_MAX_WORKERS, &last_tenant(parser)->limits.connections);
}

static void set_max_sequences(struct parser *parser, const char *key, const char *value)
{
	set_number(parser, key, value, 1, SEQUENCES_MAX, &last_tenant(parser)->limits.sequences);
}

static void set_max_layouts(struct parser *parser, const char *key, const char *value)
{
	set_number(parser, key, value, 1, META_MAX_WORKERS, &last_tenant(parser)->limits.layouts);
}

static void set_max_entries(struct parser *parser, const char *key, const char *value)
{
	set_number(parser, key, value, 1, ENTRIES_MAX, &last_tenant(parser)->limits.entries);
}

static void set_max_staged_rows(struct parser *parser, const char *key, const char *value)
{
	uint32_t rows = 0;

	set_number(parser, key, value, 1, UINT32_MAX, &rows);
	last_tenant(parser)->limits.staged_rows = rows;
}

static bool find_uid(const char *name, uid_t *ret)
{
	char buffer[PASSWD_BUFFER];
	struct passwd passwd, *found = NULL;
	uint64_t number;

	if (parse_number(name, UINT32_MAX - 1, &number)) {
		*ret = (uid_t)number;
		return true;
	}
	(void)getpwnam_r(name, &passwd, buffer, sizeof(buffer), &found);
	if (found)
		*ret = passwd.pw_uid;
	return found;
}

static void add_uid(struct parser *parser, const char *key, const char *name)
{
	struct config_tenant *tenant = last_tenant(parser);
	uid_t uid, *uids;

	if (!find_uid(name, &uid)) {
		fail(parser, -EINVAL, "%s: '%s' is not a user or a number from 0 to %u", key, name, UINT32_MAX - 1);
		return;
	}
	uids = reallocarray(tenant->uids, tenant->uid_count + 1, sizeof(*uids));
	if (!uids) {
		fail(parser, -ENOMEM, "%s: out of memory", key);
		return;
	}
	uids[tenant->uid_count++] = uid;
	tenant->uids = uids;
}

static void set_uids(struct parser *parser, const char *key, const char *value)
{
	char *copy = strdup(value);
	char *rest = NULL;

	if (!copy) {
		fail(parser, -ENOMEM, "%s: out of memory", key);
		return;
	}
	for (char *name = strtok_r(copy, "," SPACES, &rest); name; name = strtok_r(NULL, "," SPACES, &rest))
		add_uid(parser, key, name);
	free(copy);
	if (last_tenant(parser)->uid_count == 0)
		fail(parser, -EINVAL, "%s: '%s' names no user", key, value);
}

static const struct key {
	enum section section;
	const char *name;
	void (*set)(struct parser *parser, const char *key, const char *value);
} keys[] = {
	[KEY_DEVICE_SIZE] = {SECTION_POOL, "device.size", set_device_size},
	[KEY_EXTENT_SIZE] = {SECTION_POOL, "extent_size", set_extent_size},
	[KEY_INDEX] = {SECTION_POOL, "device.index", set_device_index},
	[KEY_BUDGETS] = {SECTION_TENANT, "device.min", set_min},
	{SECTION_TENANT, "device.high", set_high},
	{SECTION_TENANT, "device.max", set_max},
	{SECTION_TENANT, "host.min", set_min},
	{SECTION_TENANT, "host.high", set_high},
	{SECTION_TENANT, "host.max", set_max},
	{SECTION_POOL, "kind", set_kind},
	{SECTION_POOL, "host.size", set_host_size},
	{SECTION_DAEMON, "spin_us", set_spin_us},
	{SECTION_DAEMON, "isolation", set_isolation},
	{SECTION_DAEMON, "wait_ms", set_wait_ms},
	{SECTION_DAEMON, "pressure_ms", set_pressure_ms},
	{SECTION_DAEMON, "budgets_dir", set_budgets_dir},
	{SECTION_ADMIN, "socket", set_admin_socket},
	{SECTION_ADMIN, "mode", set_admin_mode},
	{SECTION_ADMIN, "group", set_admin_group},
	{SECTION_TENANT, "socket", set_tenant_socket},
	{SECTION_TENANT, "mode", set_tenant_mode},
	{SECTION_TENANT, "uids", set_uids},
	{SECTION_TENANT, "ipc", set_ipc},
	{SECTION_TENANT, "max_connections", set_max_connections},
	{SECTION_TENANT, "max_sequences", set_max_sequences},
	{SECTION_TENANT, "max_layouts", set_max_layouts},
	{SECTION_TENANT, "max_entries", set_max_entries},
	{SECTION_TENANT, "max_staged_rows", set_max_staged_rows},
};
_Static_assert(ARRAY_SIZE(keys) <= KEYS, "a line for each key");

static const char *section_name(enum section section)
{
	static const char *const names[] = {"", "pool", "daemon", "admin", "tenant"};

	return names[section];
}

/* Called by inih for each key; the section that it passes is not ours. */
static int on_key(void *user, const char *section, const char *name, const char *value)
{
	struct parser *parser = user;
	unsigned *seen = parser->section == SECTION_TENANT ? last_lines(parser)->keys : parser->seen;

	(void)section;
	if (parser->section == SECTION_NONE) {
		fail(parser, -EINVAL, "%s: the key stands before the first section", name);
		return 0;
	}
	for (size_t i = 0; i < ARRAY_SIZE(keys); i++) {
		if (keys[i].section != parser->section || strcmp(keys[i].name, name) != 0)
			continue;
		if (seen[i])
			fail(parser, -EINVAL, "%s: the key stands in line %u already", name, seen[i]);
		else
			keys[i].set(parser, name, value);
		seen[i] = parser->line;
		return !parser->error;
	}
	fail(parser, -EINVAL, "%s: there is no such key in [%s]", name, section_name(parser->section));
	return 0;
}

static bool name_is_valid(const char *name)
{
	size_t length = strlen(name);

	for (size_t i = 0; i < length; i++)
		if (!isascii(name[i]) || !(isalnum((unsigned char)name[i]) || strchr("_.-", name[i])))
			return false;
	return length > 0 && length <= TENANT_NAME_MAX;
}

static void add_tenant(struct parser *parser, const char *name)
{
	struct config *config = &parser->config;
	struct config_tenant *tenants;
	struct tenant_lines *lines;

	if (!name_is_valid(name)) {
		fail(parser, -EINVAL, "[tenant %s]: a name has 1 to %d of A-Z a-z 0-9 _ . -", name, TENANT_NAME_MAX);
		return;
	}
	for (size_t i = 0; i < config->tenant_count; i++)
		if (strcmp(config->tenants[i].name, name) == 0) {
			fail(parser, -EINVAL, "[tenant %s]: the tenant stands in line %u already", name,
				parser->lines[i].name);
			return;
		}
	tenants = reallocarray(config->tenants, config->tenant_count + 1, sizeof(*tenants));
	if (tenants)
		config->tenants = tenants;
	lines = reallocarray(parser->lines, config->tenant_count + 1, sizeof(*lines));
	if (lines)
		parser->lines = lines;
	if (!tenants || !lines) {
		fail(parser, -ENOMEM, "[tenant %s]: out of memory", name);
		return;
	}
	lines[config->tenant_count] = (struct tenant_lines){.name = parser->line};
	tenants[config->tenant_count++] = (struct config_tenant){.mode = 0600, .limits = TENANT_LIMITS};
	set_string(parser, "tenant", name, &last_tenant(parser)->name);
}

/* line is "[...]" without the spaces around it. */
static void open_section(struct parser *parser, const char *line, size_t length)
{
	const char *end = memchr(line, ']', length);
	const char *rest = end ? end + 1 + strspn(end + 1, SPACES) : NULL;
	char name[SECTION_MAX];

	if (!end || (rest < line + length && *rest != ';' && *rest != '#')) {
		fail(parser, -EINVAL, "'%.*s' is not a [section]", (int)(length < 100 ? length : 100), line);
		return;
	}
	(void)snprintf(name, sizeof(name), "%.*s", (int)(end - line - 1), line + 1);
	for (enum section i = SECTION_POOL; i < SECTION_TENANT; i++)
		if (strcmp(name, section_name(i)) == 0) {
			parser->section = i;
			return;
		}
	parser->section = SECTION_TENANT;
	if (strncmp(name, "tenant", 6) == 0 && isblank((unsigned char)name[6]))
		add_tenant(parser, name + 7 + strspn(name + 7, " \t"));
	else
		fail(parser, -EINVAL, "[%s]: the sections are [pool], [daemon], [admin] and [tenant NAME]", name);
}

/* The next line for inih, without the spaces around it (inih takes an indented line for the last one's end). */
static char *read_line(char *out, int size, void *user)
{
	struct parser *parser = user;
	const char *line = parser->at;
	size_t length = strcspn(line, "\n");

	if (parser->error || *line == '\0')
		return NULL;
	parser->line++;
	parser->at = line[length] ? line + length + 1 : line + length;
	while (length > 0 && strchr(SPACES, *line))
		line++, length--;
	while (length > 0 && strchr(SPACES, line[length - 1]))
		length--;
	if (length == 0 || line[0] == '#' || line[0] == ';') {
		length = 0;
	} else if (line[0] == '[') {
		open_section(parser, line, length);
		length = 0;
	} else if (length + 2 > (size_t)size) {
		fail(parser, -EINVAL, "a line of %zu bytes, more than the limit of %d: '%.20s...'", length, size - 2,
			line);
	} else if (!memchr(line, '=', length) && !memchr(line, ':', length)) {
		fail(parser, -EINVAL, "'%.*s' is not 'key = value'", (int)length, line);
	}
	if (parser->error)
		return NULL;
	memcpy(out, line, length);
	memcpy(out + length, "\n", 2);
	return out;
}

static void parse(struct parser *parser)
{
	int r = ini_parse_stream(read_line, parser, on_key, parser);

	if (r > 0 && (!parser->error || (unsigned)r < parser->line)) {
		parser->error = 0;
		parser->line = (unsigned)r;
		fail(parser, -EINVAL, "the line is not 'key = value'");
	} else if (r < 0) {
		fail(parser, -ENOMEM, "out of memory");
	}
	parser->line = 0;
}

static uint64_t default_extent(const struct config *config)
{
	bool cuda = config->kind == CONFIG_CUDA;
	uint64_t size = cuda ? EXTENT_MIN_CUDA : EXTENT_DEFAULT, count;

	for (; size < EXTENT_MAX; size *= 2) {
		count = cuda && size < EXTENT_LARGE_CUDA ? EXTENT_COUNT_CUDA : EXTENT_COUNT;
		if (size >= config->device_size / count)
			break;
	}
	return size;
}

/* What only the cuda kind has, or allows. */
static void check_kind(struct parser *parser)
{
	const struct config *config = &parser->config;
	char extent[KVG_SIZE_TEXT];

	parser->line = parser->seen[KEY_INDEX];
	if (parser->line && config->kind != CONFIG_CUDA)
		fail(parser, -EINVAL, "device.index: there is a device only with kind = cuda");
	parser->line = parser->seen[KEY_EXTENT_SIZE];
	if (parser->line && config->kind == CONFIG_CUDA && config->extent_size < EXTENT_MIN_CUDA)
		fail(parser, -EINVAL, "extent_size: %s is less than the 2.0 MiB that a GPU maps at least",
			kvg_size_format(config->extent_size, extent));
	parser->line = 0;
}

static void check_pool(struct parser *parser)
{
	struct config *config = &parser->config;
	char size[KVG_SIZE_TEXT], extent[KVG_SIZE_TEXT];

	if (!parser->seen[KEY_DEVICE_SIZE]) {
		fail(parser, -EINVAL, "there is no device.size in [pool]");
		return;
	}
	check_kind(parser);
	if (config->extent_size == 0)
		config->extent_size = default_extent(config);
	parser->line = parser->seen[KEY_DEVICE_SIZE];
	if (config->device_size < config->extent_size)
		fail(parser, -EINVAL, "device.size: %s is less than one extent, %s",
			kvg_size_format(config->device_size, size), kvg_size_format(config->extent_size, extent));
	parser->line = 0;
}

static const char *size_key(enum tenant_tier tier)
{
	return tier == TENANT_HOST ? "host.size" : "device.size";
}

/* What tenants can have of a tier; memory of the device comes in whole extents. */
static uint64_t size_of(const struct config *config, enum tenant_tier tier)
{
	return tier == TENANT_HOST ? config->host_size : config->device_size;
}

/* The line of a budget's key (0: min, 1: high, 2: max), or 0; and its name. */
static unsigned budget_line(const struct parser *parser, size_t index, enum tenant_tier tier, unsigned which)
{
	return parser->lines[index].keys[KEY_BUDGETS + tier * 3u + which];
}

static const char *budget_key(enum tenant_tier tier, unsigned which)
{
	return keys[KEY_BUDGETS + tier * 3u + which].name;
}

/* Fails when the value of a budget's key is not between two others. */
static void check_budget(struct parser *parser, size_t index, enum tenant_tier tier, unsigned which, bool wrong,
	uint64_t value, const char *how, uint64_t limit)
{
	char a[KVG_SIZE_TEXT], b[KVG_SIZE_TEXT];

	parser->line = budget_line(parser, index, tier, which);
	if (wrong)
		fail(parser, -EINVAL, "%s: %s (%llu bytes) of tenant '%s' is %s, %s (%llu bytes)",
			budget_key(tier, which), kvg_size_format(value, a), (unsigned long long)value,
			parser->config.tenants[index].name, how, kvg_size_format(limit, b), (unsigned long long)limit);
}

static void finish_budget(struct parser *parser, size_t index, enum tenant_tier tier)
{
	struct budget *budget = &parser->config.tenants[index].budgets[tier];
	uint64_t size = size_of(&parser->config, tier);
	char more[64];

	if (!budget_line(parser, index, tier, 2))
		budget->max = size;
	(void)snprintf(more, sizeof(more), "more than %s of [pool]", size_key(tier));
	check_budget(parser, index, tier, 2, budget->max > size, budget->max, more, size);
	(void)snprintf(more, sizeof(more), "more than its %s", budget_key(tier, 2));
	check_budget(parser, index, tier, 0, budget->min > budget->max, budget->min, more, budget->max);
	check_budget(parser, index, tier, 1, budget->high > budget->max, budget->high, more, budget->max);
	(void)snprintf(more, sizeof(more), "less than its %s", budget_key(tier, 0));
	check_budget(
		parser, index, tier, 1, budget->high && budget->high < budget->min, budget->high, more, budget->min);
}

/* The min of all tenants are there at once. */
static void check_sum(struct parser *parser, enum tenant_tier tier)
{
	const struct config *config = &parser->config;
	uint64_t size = size_of(config, tier), sum = 0;
	char a[KVG_SIZE_TEXT], b[KVG_SIZE_TEXT];

	if (tier == TENANT_DEVICE)
		size = size / config->extent_size * config->extent_size;
	for (size_t i = 0; i < config->tenant_count && !parser->error; i++) {
		sum += config->tenants[i].budgets[tier].min; /* each is at most 4 EiB, and the sum so far, too */
		parser->line = budget_line(parser, i, tier, 0);
		if (sum > size)
			fail(parser, -EINVAL,
				"%s: with tenant '%s' the min of all tenants are %s (%llu bytes), more than %s of "
				"[pool], %s (%llu bytes%s)",
				budget_key(tier, 0), config->tenants[i].name, kvg_size_format(sum, a),
				(unsigned long long)sum, size_key(tier), kvg_size_format(size, b),
				(unsigned long long)size, tier == TENANT_DEVICE ? " in whole extents" : "");
	}
}

static void finish_tenant(struct parser *parser, size_t index)
{
	struct config_tenant *tenant = &parser->config.tenants[index];

	finish_budget(parser, index, TENANT_DEVICE);
	finish_budget(parser, index, TENANT_HOST);
	if (!tenant->socket && asprintf(&tenant->socket, "%s.sock", tenant->name) < 0) {
		tenant->socket = NULL;
		fail(parser, -ENOMEM, "out of memory");
	}
}

static void check_sockets(struct parser *parser, size_t index)
{
	const struct config *config = &parser->config;
	const struct config_tenant *tenant = &config->tenants[index];

	parser->line = parser->lines[index].name;
	if (strcmp(tenant->socket, config->admin_socket ? config->admin_socket : "admin.sock") == 0)
		fail(parser, -EINVAL, "socket: '%s' of tenant '%s' is the admin socket", tenant->socket, tenant->name);
	for (size_t i = 0; i < index; i++)
		if (strcmp(tenant->socket, config->tenants[i].socket) == 0)
			fail(parser, -EINVAL, "socket: '%s' of tenant '%s' is that of tenant '%s'", tenant->socket,
				tenant->name, config->tenants[i].name);
}

static void check(struct parser *parser)
{
	check_pool(parser);
	if (parser->config.tenant_count == 0)
		fail(parser, -EINVAL, "there is no [tenant NAME]");
	for (size_t i = 0; i < parser->config.tenant_count && !parser->error; i++)
		finish_tenant(parser, i);
	if (!parser->error)
		check_sum(parser, TENANT_DEVICE);
	if (!parser->error)
		check_sum(parser, TENANT_HOST);
	for (size_t i = 0; i < parser->config.tenant_count && !parser->error; i++)
		check_sockets(parser, i);
}

/* Ends data with a NUL and finds others. */
static void check_bytes(struct parser *parser, char *data, size_t size)
{
	const char *nul = memchr(data, '\0', size);

	data[size] = '\0';
	if (nul) {
		parser->line = 1;
		for (const char *at = data; (at = memchr(at, '\n', (size_t)(nul - at))); at++)
			parser->line++;
		fail(parser, -EINVAL, "there is a NUL byte");
	}
}

/* Reads into data (FILE_MAX_BYTES and one more) until the end. */
static size_t read_all(struct parser *parser, char *data)
{
	_cleanup_close_ int fd = open(parser->path, O_RDONLY | O_CLOEXEC);
	size_t size = 0;
	ssize_t n = 1;

	if (fd < 0) {
		fail(parser, -errno, "cannot be opened: %s", strerror(errno));
		return 0;
	}
	while (n != 0 && size <= FILE_MAX_BYTES) {
		n = read(fd, data + size, FILE_MAX_BYTES + 1 - size);
		if (n > 0) {
			size += (size_t)n;
		} else if (n < 0 && errno != EINTR) {
			fail(parser, -errno, "cannot be read: %s", strerror(errno));
			return 0;
		}
	}
	if (size > FILE_MAX_BYTES)
		fail(parser, -EFBIG, "the file has more than the limit of %u bytes", FILE_MAX_BYTES);
	return size;
}

static void read_config(struct parser *parser)
{
	char *data = malloc(FILE_MAX_BYTES + 1);
	size_t size;

	if (!data) {
		fail(parser, -ENOMEM, "out of memory");
		return;
	}
	size = read_all(parser, data);
	if (!parser->error)
		check_bytes(parser, data, size);
	if (!parser->error) {
		parser->at = data;
		parse(parser);
	}
	free(data);
}

int config_read(const char *path, struct config *ret, char *text)
{
	struct parser parser = {.path = path,
		.text = text,
		.config = {.spin_us = SPIN_US_DEFAULT,
			.wait_ms = WAIT_MS_DEFAULT,
			.pressure_ms = PRESSURE_MS,
			.admin_mode = 0660}};

	read_config(&parser);
	if (!parser.error)
		check(&parser);
	free(parser.lines);
	if (parser.error) {
		config_deinit(&parser.config);
		return parser.error;
	}
	*ret = parser.config;
	return 0;
}

void config_deinit(struct config *config)
{
	for (size_t i = 0; i < config->tenant_count; i++) {
		free(config->tenants[i].name);
		free(config->tenants[i].socket);
		free(config->tenants[i].uids);
	}
	free(config->tenants);
	free(config->budgets_dir);
	free(config->admin_socket);
	free(config->admin_group);
	*config = (struct config){0};
}
