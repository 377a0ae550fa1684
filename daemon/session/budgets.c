#include "daemon/session/budgets.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/base/cleanup.h"
#include "daemon/base/log.h"
#include "proto/size.h"

#define FILE_NAME "budgets.conf"
#define SPACES    " \t\r\n"

#define FILE_MAX_BYTES (1 << 20)

struct entry {
	struct tenant *tenant;
	struct budget_values configured; /* all are set */
	struct budget_values live;
};

struct budgets {
	char *dir, *path, *new_path;
	struct entry *entries;
	size_t count;
};

static const char *const key_names[BUDGET_KEYS] = {
	"device.min", "device.high", "device.max", "host.min", "host.high", "host.max"};

const char *budget_key_name(unsigned key)
{
	return key_names[key];
}

static struct budget_values current(const struct tenant *tenant)
{
	struct budget_values values;

	for (unsigned tier = 0; tier < TENANT_TIERS; tier++) {
		struct budget budget = tenant_budget(tenant, (enum tenant_tier)tier);

		values.bytes[tier * 3] = budget.min;
		values.bytes[tier * 3 + 1] = budget.high;
		values.bytes[tier * 3 + 2] = budget.max;
	}
	for (unsigned key = 0; key < BUDGET_KEYS; key++)
		values.set[key] = true;
	return values;
}

int budgets_new(struct tenant *const *tenants, size_t tenant_count, const char *state_dir, struct budgets **ret)
{
	struct budgets *budgets = calloc(1, sizeof(*budgets));

	if (!budgets)
		return -ENOMEM;
	budgets->entries = calloc(tenant_count, sizeof(struct entry));
	budgets->dir = strdup(state_dir);
	if (asprintf(&budgets->path, "%s/" FILE_NAME, state_dir) < 0)
		budgets->path = NULL;
	if (asprintf(&budgets->new_path, "%s/" FILE_NAME ".new", state_dir) < 0)
		budgets->new_path = NULL;
	if (!budgets->entries || !budgets->dir || !budgets->path || !budgets->new_path) {
		(void)budgets_free(budgets);
		return -ENOMEM;
	}
	for (; budgets->count < tenant_count; budgets->count++)
		budgets->entries[budgets->count] = (struct entry){
			.tenant = tenants[budgets->count], .configured = current(tenants[budgets->count])};
	*ret = budgets;
	return 0;
}

struct budgets *budgets_free(struct budgets *budgets)
{
	if (!budgets)
		return NULL;
	free(budgets->dir);
	free(budgets->path);
	free(budgets->new_path);
	free(budgets->entries);
	free(budgets);
	return NULL;
}

bool budgets_are_live(const struct budgets *budgets, size_t tenant)
{
	for (unsigned key = 0; key < BUDGET_KEYS; key++)
		if (budgets->entries[tenant].live.set[key])
			return true;
	return false;
}

/* ---- setting ---- */

/* The configuration's values, but for those that were set. */
static struct budget_values merge(const struct budget_values *under, const struct budget_values *over)
{
	struct budget_values merged = *under;

	for (unsigned key = 0; key < BUDGET_KEYS; key++)
		if (over->set[key])
			merged.bytes[key] = over->bytes[key];
	return merged;
}

static int set_tier(struct tenant *tenant, enum tenant_tier tier, const struct budget_values *values, char *text)
{
	const uint64_t *bytes = values->bytes + tier * 3u;

	return quota_set(tier == TENANT_HOST ? &tenant->host : &tenant->quota, bytes[0], bytes[1], bytes[2], text);
}

/* Both tiers or none. The memory of the device's min follows when that is final. */
static int set_accounts(struct tenant *tenant, const struct budget_values *values, char *text)
{
	struct budget_values before = current(tenant);
	int r = set_tier(tenant, TENANT_DEVICE, values, text);

	if (r < 0)
		return r;
	r = set_tier(tenant, TENANT_HOST, values, text);
	if (r < 0) {
		char none[QUOTA_TEXT];

		(void)set_tier(tenant, TENANT_DEVICE, &before, none); /* as it was just now, so that it fits */
	}
	return r;
}

static void log_changes(const struct tenant *tenant, const struct budget_values *from, const struct budget_values *to)
{
	char a[KVG_SIZE_TEXT], b[KVG_SIZE_TEXT];

	for (unsigned key = 0; key < BUDGET_KEYS; key++)
		if (from->bytes[key] != to->bytes[key])
			log_info("%s: %s %s -> %s", tenant->quota.name, key_names[key],
				kvg_size_format(from->bytes[key], a), kvg_size_format(to->bytes[key], b));
}

/* ---- the file ---- */

static bool write_entry(FILE *file, const struct entry *entry)
{
	bool named = false;

	for (unsigned key = 0; key < BUDGET_KEYS; key++) {
		if (!entry->live.set[key])
			continue;
		if (!named && fprintf(file, "\n[tenant %s]\n", entry->tenant->name) < 0)
			return false;
		named = true;
		if (fprintf(file, "%s = %" PRIu64 "\n", key_names[key], entry->live.bytes[key]) < 0)
			return false;
	}
	return true;
}

static int write_entries(const struct budgets *budgets, FILE *file)
{
	bool written = fputs("# Budgets that were set while kvgated ran. They come before those of the configuration;\n"
			     "# kvgatectl budget reset TENANT takes a tenant's out.\n",
			       file) >= 0;

	for (size_t i = 0; written && i < budgets->count; i++)
		written = write_entry(file, &budgets->entries[i]);
	if (written && fflush(file) == 0 && fsync(fileno(file)) == 0)
		return 0;
	return errno ? -errno : -EIO;
}

static int write_new(const struct budgets *budgets)
{
	int fd = open(budgets->new_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644), r;
	FILE *file = fd < 0 ? NULL : fdopen(fd, "w");

	if (!file) {
		r = -errno;
		if (fd >= 0)
			(void)close(fd);
		return r;
	}
	errno = 0;
	r = write_entries(budgets, file);
	if (fclose(file) == EOF && r >= 0)
		r = errno ? -errno : -EIO;
	return r;
}

static int sync_dir(const struct budgets *budgets)
{
	_cleanup_close_ int fd = open(budgets->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	return fd < 0 || fsync(fd) < 0 ? -errno : 0;
}

static int save(const struct budgets *budgets, char *text)
{
	int r = write_new(budgets);

	if (r >= 0 && rename(budgets->new_path, budgets->path) < 0)
		r = -errno;
	if (r < 0)
		(void)unlink(budgets->new_path);
	else
		r = sync_dir(budgets);
	if (r < 0)
		(void)snprintf(text, BUDGET_TEXT, "%s: cannot be written: %s; nothing was changed", budgets->path,
			strerror(-r));
	return r;
}

/* The live values of a tenant become these: accounts, file, memory. */
static int change(struct budgets *budgets, size_t index, const struct budget_values *live, char *text)
{
	struct entry *entry = &budgets->entries[index];
	const struct budget_values before = current(entry->tenant), live_before = entry->live;
	const struct budget_values after = merge(&entry->configured, live);
	char none[BUDGET_TEXT];
	int r = set_accounts(entry->tenant, &after, text);

	if (r < 0)
		return r;
	entry->live = *live;
	r = save(budgets, text);
	if (r < 0) {
		entry->live = live_before;
		(void)set_accounts(entry->tenant, &before, none);
		(void)save(budgets, none); /* it may have been written all the same */
		return r;
	}
	log_changes(entry->tenant, &before, &after);
	reserve_update(&entry->tenant->reserve);
	return 0;
}

int budgets_set(struct budgets *budgets, size_t tenant, const struct budget_values *values, char *text)
{
	struct budget_values live = budgets->entries[tenant].live;

	for (unsigned key = 0; key < BUDGET_KEYS; key++) {
		if (!values->set[key])
			continue;
		live.set[key] = true;
		live.bytes[key] = values->bytes[key];
	}
	return change(budgets, tenant, &live, text);
}

int budgets_reset(struct budgets *budgets, size_t tenant, char *text)
{
	return change(budgets, tenant, &(struct budget_values){0}, text);
}

/* ---- the start ---- */

struct reader {
	struct budgets *budgets;
	struct entry *entry; /* of the section; NULL: of nobody */
	unsigned line;
};

static void __attribute__((format(printf, 2, 3))) ignore(const struct reader *reader, const char *format, ...)
{
	char text[BUDGET_TEXT];
	va_list arguments;

	va_start(arguments, format);
	(void)vsnprintf(text, sizeof(text), format, arguments);
	va_end(arguments);
	log_warning("%s:%u: ignored: %s", reader->budgets->path, reader->line, text);
}

static struct entry *find_entry(const struct budgets *budgets, const char *name)
{
	for (size_t i = 0; i < budgets->count; i++)
		if (strcmp(budgets->entries[i].tenant->name, name) == 0)
			return &budgets->entries[i];
	return NULL;
}

/* "[tenant NAME]" */
static void read_section(struct reader *reader, char *line)
{
	size_t length = strlen(line);

	reader->entry = NULL;
	if (strncmp(line, "[tenant ", 8) != 0 || line[length - 1] != ']') {
		ignore(reader, "'%.100s' is not [tenant NAME]", line);
		return;
	}
	line[length - 1] = '\0';
	reader->entry = find_entry(reader->budgets, line + 8);
	if (!reader->entry)
		ignore(reader, "there is no tenant %.100s any more", line + 8);
}

/* "device.max = 1048576" */
static void read_value(struct reader *reader, char *line)
{
	char *value = strchr(line, '='), *end;
	unsigned key = 0;

	if (value) {
		*value++ = '\0';
		value += strspn(value, SPACES);
		for (end = line + strlen(line); end > line && strchr(SPACES, end[-1]);)
			*--end = '\0';
		while (key < BUDGET_KEYS && strcmp(line, key_names[key]) != 0)
			key++;
	}
	if (!value || key == BUDGET_KEYS)
		ignore(reader, "'%.100s' is no budget", line);
	else if (reader->entry && kvg_size_parse(value, &reader->entry->live.bytes[key]) < 0)
		ignore(reader, "%s: '%.100s' is not a size", line, value);
	else if (reader->entry)
		reader->entry->live.set[key] = true;
}

static void read_line(struct reader *reader, char *line)
{
	size_t length = strlen(line);

	reader->line++;
	while (length > 0 && strchr(SPACES, line[length - 1]))
		line[--length] = '\0';
	line += strspn(line, SPACES);
	if (line[0] == '[')
		read_section(reader, line);
	else if (line[0] != '\0' && line[0] != '#' && line[0] != ';')
		read_value(reader, line);
}

/* Whether it is a regular file of a size that this daemon may have written. 0 or a negative errno. */
static int check_file(int fd)
{
	struct stat st;

	if (fd < 0 || fstat(fd, &st) < 0)
		return -errno;
	if (!S_ISREG(st.st_mode))
		return S_ISDIR(st.st_mode) ? -EISDIR : -EINVAL;
	return st.st_size > FILE_MAX_BYTES ? -EFBIG : 0;
}

static int open_file(const struct budgets *budgets, FILE **ret)
{
	int fd = open(budgets->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK), r = check_file(fd);

	*ret = r < 0 ? NULL : fdopen(fd, "r");
	if (*ret)
		return 0;
	if (r >= 0)
		r = -errno;
	if (fd >= 0)
		(void)close(fd);
	return r;
}

static int read_file(struct budgets *budgets)
{
	struct reader reader = {.budgets = budgets};
	char *line = NULL;
	size_t size = 0;
	FILE *file;
	int r = open_file(budgets, &file);

	if (r < 0)
		return r == -ENOENT ? 0 : r;
	errno = 0;
	while (getline(&line, &size, file) >= 0)
		read_line(&reader, line);
	if (!feof(file))
		r = errno ? -errno : -EIO;
	free(line);
	(void)fclose(file);
	return r;
}

/* Whether some live value of the tier waits to be set. */
static bool is_waiting(const struct entry *entry, enum tenant_tier tier)
{
	const struct budget_values now = current(entry->tenant), wanted = merge(&entry->configured, &entry->live);

	return memcmp(now.bytes + tier * 3u, wanted.bytes + tier * 3u, 3 * sizeof(uint64_t)) != 0;
}

/* Sets one tier of a tenant, if it can be. */
static int try_tier(const struct entry *entry, enum tenant_tier tier, char *text)
{
	const struct budget_values wanted = merge(&entry->configured, &entry->live);

	return set_tier(entry->tenant, tier, &wanted, text);
}

/* One tenant's min may wait for that of another to go down: again and again, as long as something comes of it. */
static void set_all(struct budgets *budgets)
{
	char text[QUOTA_TEXT];
	bool moved;

	do {
		moved = false;
		for (size_t i = 0; i < budgets->count * TENANT_TIERS; i++) {
			const struct entry *entry = &budgets->entries[i / TENANT_TIERS];
			enum tenant_tier tier = (enum tenant_tier)(i % TENANT_TIERS);

			moved |= is_waiting(entry, tier) && try_tier(entry, tier, text) >= 0;
		}
	} while (moved);
}

static void drop_misfits(struct budgets *budgets)
{
	char text[QUOTA_TEXT];

	for (size_t i = 0; i < budgets->count * TENANT_TIERS; i++) {
		struct entry *entry = &budgets->entries[i / TENANT_TIERS];
		enum tenant_tier tier = (enum tenant_tier)(i % TENANT_TIERS);

		if (!is_waiting(entry, tier) || try_tier(entry, tier, text) >= 0)
			continue;
		log_warning("%s: ignored, the configuration holds: %s", budgets->path, text);
		memset(entry->live.set + tier * 3u, 0, 3 * sizeof(bool));
	}
}

int budgets_load(struct budgets *budgets, char *text)
{
	int r = read_file(budgets);

	if (r < 0) {
		(void)snprintf(text, BUDGET_TEXT, "%s: cannot be read: %s", budgets->path, strerror(-r));
		return r;
	}
	set_all(budgets);
	drop_misfits(budgets);
	for (size_t i = 0; i < budgets->count; i++) {
		const struct entry *entry = &budgets->entries[i];
		const struct budget_values now = current(entry->tenant);

		log_changes(entry->tenant, &entry->configured, &now);
		reserve_update(&entry->tenant->reserve);
	}
	return 0;
}
