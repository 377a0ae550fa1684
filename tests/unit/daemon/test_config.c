#include "daemon/config.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/support/runner.h"

#define MINIMAL "[pool]\ndevice.size = 64M\n[tenant a]\nsocket = a.sock\n"

/* config_read() of size bytes. */
static int read_bytes(const char *data, size_t size, struct config *ret, char *text)
{
	int fd = memfd_create("config", MFD_CLOEXEC);
	char path[64];
	int r;

	assert_true(fd >= 0);
	assert_int_equal(write(fd, data, size), size);
	(void)snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	text[0] = '\0';
	r = config_read(path, ret, text);
	assert_int_equal(close(fd), 0);
	if (r < 0)
		assert_memory_equal(text, path, strlen(path));
	return r;
}

static void expect_config(const char *content, struct config *ret)
{
	char text[CONFIG_TEXT];

	if (read_bytes(content, strlen(content), ret, text) != 0)
		fail_msg("%s", text);
}

/* where is "" or ":LINE"; what comes after it and ": ". */
static void expect_refusal(const char *content, const char *where, const char *what)
{
	struct config config = {.spin_us = 4711};
	char text[CONFIG_TEXT], expected[CONFIG_TEXT];
	const char *rest;

	assert_int_equal(read_bytes(content, strlen(content), &config, text), -EINVAL);
	assert_int_equal(config.spin_us, 4711);
	rest = text + strlen("/proc/self/fd/");
	rest += strspn(rest, "0123456789");
	(void)snprintf(expected, sizeof(expected), "%s: %s", where, what);
	assert_string_equal(rest, expected);
}

static void test_defaults(void **state)
{
	struct config config;

	(void)state;
	expect_config(MINIMAL, &config);
	assert_int_equal(config.device_size, 64 << 20);
	assert_int_equal(config.extent_size, 256 << 10);
	assert_int_equal(config.spin_us, 50);
	assert_null(config.budgets_dir);
	assert_null(config.admin_socket);
	assert_int_equal(config.admin_mode, 0660);
	assert_null(config.admin_group);
	assert_int_equal(config.tenant_count, 1);
	assert_string_equal(config.tenants[0].name, "a");
	assert_string_equal(config.tenants[0].socket, "a.sock");
	assert_int_equal(config.tenants[0].mode, 0600);
	assert_int_equal(config.tenants[0].uid_count, 0);
	assert_int_equal(config.tenants[0].budgets[TENANT_DEVICE].max, 64 << 20);
	assert_int_equal(config.kind, CONFIG_HOST);
	assert_int_equal(config.device_index, 0);
	assert_int_equal(config.isolation, CONFIG_SHARED);
	assert_int_equal(config.wait_ms, 10000);
	assert_false(config.tenants[0].ipc);
	config_deinit(&config);
	assert_null(config.tenants);
	config_deinit(&config);
}

static void test_everything(void **state)
{
	struct config config;

	(void)state;
	expect_config("\xef\xbb\xbf# comment = x\n; [comment]\n\n"
		      "[pool] ; the pool\r\n  device.size: 1.5G   ; a size\r\n\textent_size =1MiB\n"
		      "[daemon]\nspin_us=0\nbudgets_dir = /var/lib/x y\n"
		      "[admin]\nsocket = /run/x y/admin.sock\nmode = 0600\ngroup = root\n"
		      "[tenant  team-A_1.b] # one\nsocket = /run/a\nmode = 0666\nuids = root, 1000 "
		      "2000,,3000\ndevice.max = 1G\n"
		      "[tenant b]\ndevice.max = 1.5G",
		&config);
	assert_int_equal(config.device_size, UINT64_C(3) << 29);
	assert_int_equal(config.extent_size, 1 << 20);
	assert_int_equal(config.spin_us, 0);
	assert_string_equal(config.budgets_dir, "/var/lib/x y");
	assert_string_equal(config.admin_socket, "/run/x y/admin.sock");
	assert_int_equal(config.admin_mode, 0600);
	assert_string_equal(config.admin_group, "root");
	assert_int_equal(config.tenant_count, 2);
	assert_string_equal(config.tenants[0].name, "team-A_1.b");
	assert_int_equal(config.tenants[0].mode, 0666);
	assert_int_equal(config.tenants[0].uid_count, 4);
	assert_int_equal(config.tenants[0].uids[0], 0);
	assert_int_equal(config.tenants[0].uids[1], 1000);
	assert_int_equal(config.tenants[0].uids[2], 2000);
	assert_int_equal(config.tenants[0].uids[3], 3000);
	assert_int_equal(config.tenants[0].budgets[TENANT_DEVICE].max, 1 << 30);
	assert_string_equal(config.tenants[1].socket, "b.sock");
	assert_int_equal(config.tenants[1].budgets[TENANT_DEVICE].max, UINT64_C(3) << 29);
	config_deinit(&config);
}

static void test_budgets(void **state)
{
	const struct budget *budgets;
	struct config config;

	(void)state;
	expect_config("[pool]\ndevice.size = 64M\nhost.size = 1G\n[daemon]\npressure_ms = 600000\n"
		      "[tenant a]\ndevice.min = 8M\ndevice.high = 16M\ndevice.max = 32M\n"
		      "host.min = 1K\nhost.high = 2K\nhost.max = 3K\n"
		      "[tenant b]\ndevice.min = 56M\nhost.min = 1048575K\n[tenant c]\ndevice.high = 1\nhost.max = 0\n",
		&config);
	assert_int_equal(config.host_size, 1 << 30);
	assert_int_equal(config.pressure_ms, 600000);
	budgets = config.tenants[0].budgets;
	assert_int_equal(budgets[TENANT_DEVICE].min, 8 << 20);
	assert_int_equal(budgets[TENANT_DEVICE].high, 16 << 20);
	assert_int_equal(budgets[TENANT_DEVICE].max, 32 << 20);
	assert_int_equal(budgets[TENANT_HOST].min, 1 << 10);
	assert_int_equal(budgets[TENANT_HOST].high, 2 << 10);
	assert_int_equal(budgets[TENANT_HOST].max, 3 << 10);
	budgets = config.tenants[1].budgets;
	assert_int_equal(budgets[TENANT_DEVICE].high, 0);
	assert_int_equal(budgets[TENANT_DEVICE].max, 64 << 20);
	assert_int_equal(budgets[TENANT_HOST].max, 1 << 30);
	assert_int_equal(config.tenants[2].budgets[TENANT_HOST].max, 0);
	config_deinit(&config);
	expect_config(MINIMAL, &config); /* no host tier */
	assert_int_equal(config.host_size, 0);
	assert_int_equal(config.pressure_ms, 10000);
	assert_int_equal(config.tenants[0].budgets[TENANT_HOST].max, 0);
	config_deinit(&config);
}

static void test_limits(void **state)
{
	const struct tenant_limits *limits;
	struct config config;

	(void)state;
	expect_config(MINIMAL "max_connections = 1024\nmax_sequences = 1\nmax_layouts = 2\nmax_entries = 3\n"
			      "max_staged_rows = 4294967295\n[tenant b]\n",
		&config);
	limits = &config.tenants[0].limits;
	assert_int_equal(limits->connections, 1024);
	assert_int_equal(limits->sequences, 1);
	assert_int_equal(limits->layouts, 2);
	assert_int_equal(limits->entries, 3);
	assert_int_equal(limits->staged_rows, UINT32_MAX);
	limits = &config.tenants[1].limits;
	assert_int_equal(limits->connections, 256);
	assert_int_equal(limits->sequences, 65536);
	assert_int_equal(limits->layouts, 64);
	assert_int_equal(limits->entries, 65536);
	assert_int_equal(limits->staged_rows, 16777216);
	config_deinit(&config);
	expect_refusal(
		"[tenant a]\nmax_connections = 0\n", ":2", "max_connections: '0' is not a number from 1 to 1024");
	expect_refusal(
		"[tenant a]\nmax_connections = 1025\n", ":2", "max_connections: '1025' is not a number from 1 to 1024");
	expect_refusal(
		"[tenant a]\nmax_sequences = all\n", ":2", "max_sequences: 'all' is not a number from 1 to 1000000000");
	expect_refusal("[tenant a]\nmax_layouts = 0\n", ":2", "max_layouts: '0' is not a number from 1 to 1024");
	expect_refusal("[tenant a]\nmax_entries = 4194305\n", ":2",
		"max_entries: '4194305' is not a number from 1 to 4194304");
	expect_refusal("[tenant a]\nmax_staged_rows = 4294967296\n", ":2",
		"max_staged_rows: '4294967296' is not a number from 1 to 4294967295");
	expect_refusal("[daemon]\nbudgets_dir =\n", ":2", "budgets_dir: the value is empty");
	expect_refusal("[daemon]\npressure_ms = 0\n", ":2", "pressure_ms: '0' is not a number from 1 to 600000");
}

/* min <= high <= max <= the pool's, and all min fit in the pool: the line is that of the value that is too much. */
static void test_budgets_that_contradict(void **state)
{
	(void)state;
	expect_refusal(MINIMAL "device.max = 4M\ndevice.min = 5M\n", ":6",
		"device.min: 5.0 MiB (5242880 bytes) of tenant 'a' is more than its device.max, 4.0 MiB (4194304 "
		"bytes)");
	expect_refusal(MINIMAL "device.high = 65M\n", ":5",
		"device.high: 65.0 MiB (68157440 bytes) of tenant 'a' is more than its device.max, 64.0 MiB (67108864 "
		"bytes)");
	expect_refusal(MINIMAL "device.high = 1M\ndevice.min = 2M\n", ":5",
		"device.high: 1.0 MiB (1048576 bytes) of tenant 'a' is less than its device.min, 2.0 MiB (2097152 "
		"bytes)");
	expect_refusal(MINIMAL "host.max = 1\n", ":5",
		"host.max: 1 B (1 bytes) of tenant 'a' is more than host.size of [pool], 0 B (0 bytes)");
	expect_refusal(MINIMAL "host.min = 1\n", ":5",
		"host.min: 1 B (1 bytes) of tenant 'a' is more than its host.max, 0 B (0 bytes)");
	expect_refusal(MINIMAL "device.min = 40M\n[tenant b]\nsocket = b\ndevice.min = 24M\n[tenant c]\ndevice.min = 1",
		":10",
		"device.min: with tenant 'c' the min of all tenants are 64.0 MiB (67108865 bytes), more than "
		"device.size of "
		"[pool], 64.0 MiB (67108864 bytes in whole extents)");
	expect_refusal("[pool]\ndevice.size = 900K\n[tenant a]\ndevice.min = 800K\n", ":4",
		"device.min: with tenant 'a' the min of all tenants are 800.0 KiB (819200 bytes), more than "
		"device.size of "
		"[pool], 768.0 KiB (786432 bytes in whole extents)");
	expect_refusal(
		"[pool]\ndevice.size = 1M\nhost.size = 2K\n[tenant a]\nhost.min = 1K\n[tenant b]\nhost.min = 1025\n",
		":7",
		"host.min: with tenant 'b' the min of all tenants are 2.0 KiB (2049 bytes), more than host.size of "
		"[pool], "
		"2.0 KiB (2048 bytes)");
}

static void test_cuda(void **state)
{
	struct config config;

	(void)state;
	expect_config("[pool]\ndevice.size = 40G\nkind = cuda\ndevice.index = 3\n"
		      "[daemon]\nisolation = strict\nwait_ms = 600000\n"
		      "[tenant a]\nipc = yes\n[tenant b]\nipc = no\n",
		&config);
	assert_int_equal(config.kind, CONFIG_CUDA);
	assert_int_equal(config.device_index, 3);
	assert_int_equal(config.extent_size, 64 << 20);
	assert_int_equal(config.isolation, CONFIG_STRICT);
	assert_int_equal(config.wait_ms, 600000);
	assert_true(config.tenants[0].ipc);
	assert_false(config.tenants[1].ipc);
	config_deinit(&config);
	expect_config("[pool]\nkind = host\ndevice.size = 1G\n[daemon]\nisolation = shared\nwait_ms = 1\n[tenant a]\n",
		&config);
	assert_int_equal(config.kind, CONFIG_HOST);
	assert_int_equal(config.wait_ms, 1);
	config_deinit(&config);
	expect_config(
		"[pool]\nkind = cuda\ndevice.size = 2M\nextent_size = 2M\ndevice.index = 1023\n[tenant a]\n", &config);
	assert_int_equal(config.extent_size, 2 << 20);
	assert_int_equal(config.device_index, 1023);
	config_deinit(&config);
}

static void test_default_extent(void **state)
{
	static const struct {
		const char *size; /* and what follows in [pool] */
		uint64_t extent;
	} cases[] = {
		{"64M\nkind = cuda", 2 << 20},
		{"1G\nkind = cuda", 2 << 20},
		{"1025M\nkind = cuda", 4 << 20},
		{"120G\nkind = cuda", 64 << 20},
		{"130G\nkind = cuda", 128 << 20},
		{"256K", 256 << 10},
		{"500M", 256 << 10},
		{"500.1M", 512 << 10},
		{"1000M", 512 << 10},
		{"80G", 64 << 20},
		{"1P", 1 << 30},
	};

	(void)state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct config config;
		char content[128];

		(void)snprintf(content, sizeof(content), "[tenant a]\n[pool]\ndevice.size = %s\n", cases[i].size);
		expect_config(content, &config);
		assert_int_equal(config.extent_size, cases[i].extent);
		config_deinit(&config);
	}
}

static void test_form(void **state)
{
	(void)state;
	expect_refusal("", "", "there is no device.size in [pool]");
	expect_refusal("a = b\n" MINIMAL, ":1", "a: the key stands before the first section");
	expect_refusal(
		MINIMAL "[what]\n", ":5", "[what]: the sections are [pool], [daemon], [admin] and [tenant NAME]");
	expect_refusal(MINIMAL "[tenants x]\n", ":5",
		"[tenants x]: the sections are [pool], [daemon], [admin] and [tenant NAME]");
	expect_refusal(MINIMAL "[pool\n", ":5", "'[pool' is not a [section]");
	expect_refusal(MINIMAL "[pool] x\n", ":5", "'[pool] x' is not a [section]");
	expect_refusal(MINIMAL "nonsense\n", ":5", "'nonsense' is not 'key = value'");
	expect_refusal(MINIMAL "nonsense ; a = b\n[bad]\n", ":5", "the line is not 'key = value'");
	expect_refusal(MINIMAL "device.mid = 1\n", ":5", "device.mid: there is no such key in [tenant]");
	expect_refusal("[pool]\nsocket = x\n", ":2", "socket: there is no such key in [pool]");
	expect_refusal("[pool]\ndevice.size = 1G\n[pool]\ndevice.size = 1G\n", ":4",
		"device.size: the key stands in line 2 already");
	expect_refusal(MINIMAL "  socket = b.sock\n", ":5", "socket: the key stands in line 4 already");
}

static void test_values(void **state)
{
	(void)state;
	expect_refusal("[pool]\ndevice.size = lots\n", ":2",
		"device.size: 'lots' is not a size such as 4096, 64K, 512M or 1.5G");
	expect_refusal(
		"[pool]\ndevice.size =\n", ":2", "device.size: '' is not a size such as 4096, 64K, 512M or 1.5G");
	expect_refusal("[pool]\ndevice.size = 9E\n", ":2", "device.size: '9E' is more than the limit, 4 EiB");
	expect_refusal(
		"[pool]\nextent_size = 96K\n", ":2", "extent_size: '96K' is not a power of two from 64 KiB to 1 GiB");
	expect_refusal(
		"[pool]\nextent_size = 32K\n", ":2", "extent_size: '32K' is not a power of two from 64 KiB to 1 GiB");
	expect_refusal(
		"[pool]\nextent_size = 2G\n", ":2", "extent_size: '2G' is not a power of two from 64 KiB to 1 GiB");
	expect_refusal("[pool]\nkind = gpu\n", ":2", "kind: 'gpu' is neither host nor cuda");
	expect_refusal("[pool]\nkind =\n", ":2", "kind: '' is neither host nor cuda");
	expect_refusal("[pool]\ndevice.index = 1024\n", ":2", "device.index: '1024' is not a number from 0 to 1023");
	expect_refusal("[pool]\ndevice.index = one\n", ":2", "device.index: 'one' is not a number from 0 to 1023");
	expect_refusal("[daemon]\nisolation = no\n", ":2", "isolation: 'no' is neither shared nor strict");
	expect_refusal("[daemon]\nwait_ms = 0\n", ":2", "wait_ms: '0' is not a number from 1 to 600000");
	expect_refusal("[daemon]\nwait_ms = 600001\n", ":2", "wait_ms: '600001' is not a number from 1 to 600000");
	expect_refusal("[tenant a]\nipc = true\n", ":2", "ipc: 'true' is neither no nor yes");
	expect_refusal("[daemon]\nspin_us = -1\n", ":2", "spin_us: '-1' is not a number from 0 to 1000000");
	expect_refusal("[daemon]\nspin_us = 1000001\n", ":2", "spin_us: '1000001' is not a number from 0 to 1000000");
	expect_refusal("[admin]\nmode = 1777\n", ":2", "mode: '1777' is not an octal mode from 0 to 0777");
	expect_refusal("[tenant a]\nmode = 0688\n", ":2", "mode: '0688' is not an octal mode from 0 to 0777");
	expect_refusal("[admin]\ngroup = no such group\n", ":2", "group: there is no group 'no such group'");
	expect_refusal("[tenant a]\nuids = 1, no-such-user\n", ":2",
		"uids: 'no-such-user' is not a user or a number from 0 to 4294967294");
	expect_refusal("[tenant a]\nuids = 4294967295\n", ":2",
		"uids: '4294967295' is not a user or a number from 0 to 4294967294");
	expect_refusal("[tenant a]\nuids = ,\n", ":2", "uids: ',' names no user");
	expect_refusal("[tenant a]\nsocket =\n", ":2", "socket: the value is empty");
}

static void test_contradictions(void **state)
{
	(void)state;
	expect_refusal("[pool]\ndevice.size = 1G\n", "", "there is no [tenant NAME]");
	expect_refusal("[tenant a]\n", "", "there is no device.size in [pool]");
	expect_refusal("[pool]\nextent_size = 1M\ndevice.size = 512K\n[tenant a]\n", ":3",
		"device.size: 512.0 KiB is less than one extent, 1.0 MiB");
	expect_refusal("[pool]\ndevice.size = 1M\nkind = cuda\n[tenant a]\n", ":2",
		"device.size: 1.0 MiB is less than one extent, 2.0 MiB");
	expect_refusal("[pool]\nextent_size = 1M\ndevice.size = 1G\nkind = cuda\n[tenant a]\n", ":2",
		"extent_size: 1.0 MiB is less than the 2.0 MiB that a GPU maps at least");
	expect_refusal("[pool]\ndevice.size = 1G\ndevice.index = 0\n[tenant a]\n", ":3",
		"device.index: there is a device only with kind = cuda");
	expect_refusal("[tenant a]\ndevice.max = 1G\n[pool]\ndevice.size = 1023M\n", ":2",
		"device.max: 1.0 GiB (1073741824 bytes) of tenant 'a' is more than device.size of [pool], 1023.0 MiB "
		"(1072693248 bytes)");
	expect_refusal(MINIMAL "[tenant a]\n", ":5", "[tenant a]: the tenant stands in line 3 already");
	expect_refusal(
		MINIMAL "[tenant b]\nsocket = a.sock\n", ":5", "socket: 'a.sock' of tenant 'b' is that of tenant 'a'");
	expect_refusal(MINIMAL "[tenant b]\nsocket = admin.sock\n", ":5",
		"socket: 'admin.sock' of tenant 'b' is the admin socket");
	expect_refusal(
		MINIMAL "[admin]\nsocket = a.sock\n", ":3", "socket: 'a.sock' of tenant 'a' is the admin socket");
}

static void test_names(void **state)
{
	char name[66], content[256], what[256];
	struct config config;

	(void)state;
	expect_refusal("[tenant ]\n", ":1", "[tenant ]: a name has 1 to 64 of A-Z a-z 0-9 _ . -");
	expect_refusal("[tenant a/b]\n", ":1", "[tenant a/b]: a name has 1 to 64 of A-Z a-z 0-9 _ . -");
	expect_refusal("[tenant \xc3\xa4]\n", ":1", "[tenant \xc3\xa4]: a name has 1 to 64 of A-Z a-z 0-9 _ . -");
	memset(name, 'n', 65);
	name[65] = '\0';
	(void)snprintf(content, sizeof(content), "[tenant %s]\n", name);
	(void)snprintf(what, sizeof(what), "[tenant %s]: a name has 1 to 64 of A-Z a-z 0-9 _ . -", name);
	expect_refusal(content, ":1", what);
	/* Two names of 64 that differ in their last letter only. */
	name[63] = 'x';
	(void)snprintf(
		content, sizeof(content), "[pool]\ndevice.size=1G\n[tenant %.64s]\n[tenant %.63sy]\n", name, name);
	expect_config(content, &config);
	assert_int_equal(config.tenant_count, 2);
	assert_int_equal(strlen(config.tenants[0].name), 64);
	assert_int_equal(config.tenants[1].name[63], 'y');
	config_deinit(&config);
}

static void test_socket_length(void **state)
{
	char path[110], content[256], what[256];
	struct config config;

	(void)state;
	memset(path, 's', 108);
	path[108] = '\0';
	(void)snprintf(content, sizeof(content), "[tenant a]\nsocket = %s\n", path);
	(void)snprintf(what, sizeof(what), "socket: '%s' has 108 bytes, more than the 107 of a socket's path", path);
	expect_refusal(content, ":2", what);
	(void)snprintf(content, sizeof(content), "[pool]\ndevice.size = 1G\n[tenant a]\nsocket = %.107s\n", path);
	expect_config(content, &config);
	assert_int_equal(strlen(config.tenants[0].socket), 107);
	config_deinit(&config);
}

/* A comment may be of any length, a key's line may not. */
static void test_long_lines(void **state)
{
	char content[1500], pad[1001], what[128];
	struct config config;

	(void)state;
	memset(pad, '1', 1000);
	pad[1000] = '\0';
	(void)snprintf(content, sizeof(content), "# %s\n" MINIMAL, pad);
	expect_config(content, &config);
	config_deinit(&config);
	(void)snprintf(content, sizeof(content), MINIMAL "uids = %s\n", pad);
	(void)snprintf(
		what, sizeof(what), "a line of 1007 bytes, more than the limit of 198: 'uids = 1111111111111...'");
	expect_refusal(content, ":5", what);
	/* The longest line is taken whole. */
	(void)snprintf(content, sizeof(content), MINIMAL "uids = %.189s,2\n",
		"0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,"
		"0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,"
		"0,0,0");
	expect_config(content, &config);
	assert_int_equal(config.tenants[0].uids[config.tenants[0].uid_count - 1], 2);
	config_deinit(&config);
}

static void test_files(void **state)
{
	const char nul[] = "[pool]\ndevice.size = 1G\n\0[tenant a]\n";
	const size_t large = (1 << 20) + 1;
	struct config config;
	char text[CONFIG_TEXT];
	char *data;

	(void)state;
	assert_int_equal(config_read("no/such/file.conf", &config, text), -ENOENT);
	assert_string_equal(text, "no/such/file.conf: cannot be opened: No such file or directory");
	assert_int_equal(config_read("/", &config, text), -EISDIR);
	assert_string_equal(text, "/: cannot be read: Is a directory");
	assert_int_equal(read_bytes(nul, sizeof(nul) - 1, &config, text), -EINVAL);
	assert_non_null(strstr(text, ":3: there is a NUL byte"));
	data = malloc(large);
	assert_non_null(data);
	memset(data, '\n', large);
	assert_int_equal(read_bytes(data, large, &config, text), -EFBIG);
	assert_non_null(strstr(text, ": the file has more than the limit of 1048576 bytes"));
	free(data);
}

/* Any prefix and any single wrong byte of a good file is read or refused, with text. */
static void test_broken(void **state)
{
	static const char content[] =
		"[pool]\ndevice.size = 64M ; x\n[admin]\nmode=0600\n[tenant a]\nuids = 1,2\nsocket = a\n";
	const size_t size = sizeof(content) - 1;
	struct config config;
	char text[CONFIG_TEXT], copy[sizeof(content)];
	int taken = 0, refused = 0;

	(void)state;
	for (size_t i = 0; i < size; i++) {
		for (int byte = 0; byte < 256; byte += 5) {
			int r;

			memcpy(copy, content, size);
			copy[i] = (char)byte;
			r = read_bytes(copy, byte ? size : i, &config, text);
			if (r == 0)
				config_deinit(&config);
			assert_true(r == 0 || (r == -EINVAL && strlen(text) > 10 && !strchr(text, '\n')));
			taken += r == 0;
			refused += r != 0;
		}
	}
	assert_true(taken > 100);
	assert_true(refused > 1000);
}

static void test_packaged(void **state)
{
	struct config config;
	char text[CONFIG_TEXT];

	(void)state;
	if (config_read("../../packaging/kvgated.conf", &config, text) != 0)
		fail_msg("%s", text);
	assert_int_equal(config.tenant_count, 1);
	assert_true(config.tenants[0].socket[0] != '/');
	config_deinit(&config);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_defaults),
		cmocka_unit_test(test_everything),
		cmocka_unit_test(test_budgets),
		cmocka_unit_test(test_limits),
		cmocka_unit_test(test_budgets_that_contradict),
		cmocka_unit_test(test_cuda),
		cmocka_unit_test(test_default_extent),
		cmocka_unit_test(test_form),
		cmocka_unit_test(test_values),
		cmocka_unit_test(test_contradictions),
		cmocka_unit_test(test_names),
		cmocka_unit_test(test_socket_length),
		cmocka_unit_test(test_long_lines),
		cmocka_unit_test(test_files),
		cmocka_unit_test(test_broken),
		cmocka_unit_test(test_packaged),
	};

	return runner_run("config", tests, sizeof(tests) / sizeof(tests[0]));
}
