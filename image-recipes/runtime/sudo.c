/*
 * sudo for images that bring none: the account `user` (and root) may do anything without a
 * password.  Reads /etc/passwd and /etc/group itself, so that it is one static file that works
 * over any distribution.  The guest is the job's own machine: this guards nothing, it only has
 * to do what scripts expect of sudo.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <grp.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SECURE_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#define MAX_GROUPS 256

struct account {
	char name[256], home[PATH_MAX], shell[PATH_MAX];
	uid_t uid;
	gid_t gid;
};

static void fail(const char *what, const char *why)
{
	fprintf(stderr, "sudo: %s%s%s\n", what, *why ? ": " : "", why);
	exit(1);
}

/* "#123" or a plain number; -1 where it is a name. */
static long as_number(const char *text)
{
	char *end;
	long value;

	if (*text == '#')
		text++;
	if (!isdigit((unsigned char)*text))
		return -1;
	value = strtol(text, &end, 10);
	return *end || value < 0 ? -1 : value;
}

/* Split a line of /etc/passwd or /etc/group at its colons; returns the number of fields. */
static int fields(char *line, char **field, int most)
{
	int n = 0;

	line[strcspn(line, "\n")] = 0;
	while (n < most && line)
		field[n++] = strsep(&line, ":");
	return n;
}

/* An account by name, or by uid where name is NULL. */
static int find_account(const char *name, uid_t uid, struct account *found)
{
	FILE *file = fopen("/etc/passwd", "re");
	char *line = NULL, *field[7];
	size_t size = 0;
	int hit = 0;

	while (file && !hit && getline(&line, &size, file) > 0) {
		if (fields(line, field, 7) < 7)
			continue;
		hit = name ? !strcmp(field[0], name) : strtoul(field[2], NULL, 10) == uid;
		if (!hit)
			continue;
		snprintf(found->name, sizeof(found->name), "%s", field[0]);
		snprintf(found->home, sizeof(found->home), "%s", *field[5] ? field[5] : "/");
		snprintf(found->shell, sizeof(found->shell), "%s", *field[6] ? field[6] : "/bin/sh");
		found->uid = strtoul(field[2], NULL, 10);
		found->gid = strtoul(field[3], NULL, 10);
	}
	free(line);
	if (file)
		fclose(file);
	return hit;
}

static int lists(char *members, const char *name)
{
	char *member;

	while ((member = strsep(&members, ",")))
		if (!strcmp(member, name))
			return 1;
	return 0;
}

/* The gid of a group by name; with groups given, also those that list `member`. */
static long read_groups(const char *name, const char *member, gid_t *groups, int *count)
{
	FILE *file = fopen("/etc/group", "re");
	char *line = NULL, *field[4];
	size_t size = 0;
	long gid = -1;

	while (file && getline(&line, &size, file) > 0) {
		if (fields(line, field, 4) < 4)
			continue;
		if (name && !strcmp(field[0], name))
			gid = strtol(field[2], NULL, 10);
		if (member && *count < MAX_GROUPS && lists(field[3], member))
			groups[(*count)++] = strtoul(field[2], NULL, 10);
	}
	free(line);
	if (file)
		fclose(file);
	return gid;
}

/* What the dynamic loader or a shell would take orders from is never passed on. */
static int dangerous(const char *variable)
{
	static const char *const names[] = { "LD_", "BASH_FUNC_", "BASH_ENV=", "ENV=", "IFS=",
		"GCONV_PATH=", "LOCALDOMAIN=", "RES_OPTIONS=", "HOSTALIASES=", "NLSPATH=",
		"PYTHON", "PERL5", "PERLLIB=", "RUBYLIB=", "JAVA_TOOL_OPTIONS=", NULL };

	for (int i = 0; names[i]; i++)
		if (!strncmp(variable, names[i], strlen(names[i])))
			return 1;
	return 0;
}

static int kept(const char *variable, const char *keep)
{
	size_t length = strcspn(variable, "=");
	static const char *const always[] = { "TERM", "DISPLAY", "XAUTHORITY", "COLORTERM", "LANG",
		"LANGUAGE", "TZ", "PS1", "EDITOR", "http_proxy", "https_proxy", "ftp_proxy",
		"no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "all_proxy", NULL };

	if (!strncmp(variable, "LC_", 3))
		return 1;
	for (int i = 0; always[i]; i++)
		if (strlen(always[i]) == length && !strncmp(variable, always[i], length))
			return 1;
	for (const char *p = keep; p && *p; p += strcspn(p, ","), p += *p == ',')
		if (strcspn(p, ",") == length && !strncmp(p, variable, length))
			return 1;
	return 0;
}

/* A new environment out of the caller's: everything with -E, else the harmless and the kept. */
static void clean_environment(int preserve, const char *keep)
{
	extern char **environ;
	char **old = environ;

	environ = NULL;
	for (; old && *old; old++)
		if (strchr(*old, '=') && !dangerous(*old) && (preserve || kept(*old, keep)))
			putenv(*old);
}

static void set_number(const char *name, unsigned long value)
{
	char text[32];

	snprintf(text, sizeof(text), "%lu", value);
	setenv(name, text, 1);
}

static void usage(int status)
{
	fprintf(status ? stderr : stdout,
		"usage: sudo [-EHnikSsPbAB] [-u USER] [-g GROUP] [-D DIR] [--preserve-env[=LIST]] "
		"[VAR=VALUE ...] [--] [COMMAND ...]\n       sudo -l | -v | -k | -K | -V\n");
	exit(status);
}

struct options {
	int preserve, set_home, login, shell, list, validate;
	const char *user, *group, *keep, *directory;
	int reset, assigned;
	char **assign;
};

/* The value of -uUSER, -u USER, --user=USER or --user USER. */
static const char *value_of(const char *attached, int argc, char **argv, int *i)
{
	if (attached && *attached)
		return attached;
	if (*i + 1 >= argc)
		usage(1);
	return argv[++*i];
}

static const char *is_long(const char *word, const char *name)
{
	size_t length = strlen(name);

	if (strncmp(word, name, length) || (word[length] && word[length] != '='))
		return NULL;
	return word + length + (word[length] == '=');
}

static void long_option(struct options *o, int argc, char **argv, int *i)
{
	const char *word = argv[*i] + 2, *value;

	if ((value = is_long(word, "user")))
		o->user = value_of(value, argc, argv, i);
	else if ((value = is_long(word, "group")))
		o->group = value_of(value, argc, argv, i);
	else if ((value = is_long(word, "chdir")))
		o->directory = value_of(value, argc, argv, i);
	else if ((value = is_long(word, "prompt")))
		value_of(value, argc, argv, i);
	else if ((value = is_long(word, "preserve-env")))
		*value ? (void)(o->keep = value) : (void)(o->preserve = 1);
	else if (!strcmp(word, "set-home"))
		o->set_home = 1;
	else if (!strcmp(word, "login"))
		o->login = 1;
	else if (!strcmp(word, "shell"))
		o->shell = 1;
	else if (!strcmp(word, "list"))
		o->list = 1;
	else if (!strcmp(word, "validate"))
		o->validate = 1;
	else if (!strcmp(word, "reset-timestamp") || !strcmp(word, "remove-timestamp"))
		o->reset = 1;
	else if (!strcmp(word, "help"))
		usage(0);
	else if (!strcmp(word, "version"))
		exit(puts("sudo (AppPot)") < 0);
	else if (strcmp(word, "non-interactive") && strcmp(word, "stdin") &&
		 strcmp(word, "preserve-groups")) {
		fprintf(stderr, "sudo: unknown option %s\n", argv[*i]);
		usage(1);
	}
}

/* One word of short options; returns when an option took the rest of it as its value. */
static void short_options(struct options *o, int argc, char **argv, int *i)
{
	for (const char *p = argv[*i] + 1; *p; p++)
		switch (*p) {
		case 'u': o->user = value_of(p + 1, argc, argv, i); return;
		case 'g': o->group = value_of(p + 1, argc, argv, i); return;
		case 'D': o->directory = value_of(p + 1, argc, argv, i); return;
		case 'p': case 'C': case 'h': case 'r': case 't': case 'T':
			value_of(p + 1, argc, argv, i);
			return;
		case 'E': o->preserve = 1; break;
		case 'H': o->set_home = 1; break;
		case 'i': o->login = 1; break;
		case 's': o->shell = 1; break;
		case 'l': o->list = 1; break;
		case 'v': o->validate = 1; break;
		case 'k': case 'K': o->reset = 1; break;
		case 'n': case 'S': case 'P': case 'A': case 'B': break;
		case 'V': exit(puts("sudo (AppPot)") < 0);
		default:
			fprintf(stderr, "sudo: unknown option -%c\n", *p);
			usage(1);
		}
}

static int is_assignment(const char *word)
{
	size_t length = strcspn(word, "=");

	return word[length] == '=' && length && !isdigit((unsigned char)*word) &&
	       strspn(word, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_") ==
		       length;
}

/* Options and VAR=VALUE words in any order; returns where the command begins. */
static int parse(struct options *o, int argc, char **argv)
{
	int i;

	for (i = 1; i < argc; i++) {
		if (is_assignment(argv[i]))
			o->assign[o->assigned++] = argv[i];
		else if (!strcmp(argv[i], "--"))
			return i + 1;
		else if (!strncmp(argv[i], "--", 2))
			long_option(o, argc, argv, &i);
		else if (argv[i][0] == '-' && argv[i][1])
			short_options(o, argc, argv, &i);
		else
			break;
	}
	return i;
}

static void become(const struct account *to, const char *group)
{
	gid_t groups[MAX_GROUPS], gid = to->gid;
	int count = 1;

	if (group) {
		long found = as_number(group);

		if (found < 0)
			found = read_groups(group, NULL, NULL, NULL);
		if (found < 0)
			fail("unknown group", group);
		gid = found;
	}
	groups[0] = gid;
	read_groups(NULL, to->name, groups, &count);
	if (setgroups(count, groups) || setresgid(gid, gid, gid) ||
	    setresuid(to->uid, to->uid, to->uid))
		fail("cannot change identity", strerror(errno));
}

/* With -i or -s: the shell, and the command as one quoted string for its -c. */
static char **shell_command(struct account *to, const struct options *o, char **argv)
{
	const char *shell = o->login || !getenv("SHELL") ? to->shell : getenv("SHELL");
	const char *base = strrchr(shell, '/') ? strrchr(shell, '/') + 1 : shell;
	char **command = calloc(5, sizeof(*command)), *line, *p;
	size_t size = 1;
	int n = 0;

	if (!command || asprintf(&command[n++], "%s%s", o->login ? "-" : "", base) < 0)
		fail("out of memory", "");
	if (!*argv)
		return command;
	for (char **a = argv; *a; a++)
		size += 2 * strlen(*a) + 1;
	if (!(p = line = malloc(size)))
		fail("out of memory", "");
	for (char **a = argv; *a; a++) {
		for (const char *c = *a; *c; *p++ = *c++)
			if (!isalnum((unsigned char)*c) && !strchr("_-$", *c))
				*p++ = '\\';
		*p++ = ' ';
	}
	p[-1] = 0;
	command[n++] = "-c";
	command[n++] = line;
	return command;
}

static void set_environment(const struct account *caller, const struct account *to,
			    const struct options *o)
{
	clean_environment(o->preserve && !o->login, o->keep);
	setenv("PATH", SECURE_PATH, 1);
	if (!o->preserve || o->set_home || o->login || !getenv("HOME"))
		setenv("HOME", to->home, 1);
	setenv("USER", to->name, 1);
	setenv("LOGNAME", to->name, 1);
	setenv("SHELL", to->shell, 1);
	setenv("SUDO_USER", caller->name, 1);
	set_number("SUDO_UID", caller->uid);
	set_number("SUDO_GID", caller->gid);
}

static void set_sudo_command(char **argv)
{
	char text[4096];
	size_t used = 0;

	for (; *argv && used < sizeof(text) - 1; argv++)
		used += snprintf(text + used, sizeof(text) - used, "%s%s", used ? " " : "", *argv);
	setenv("SUDO_COMMAND", text, 1);
}

int main(int argc, char **argv)
{
	struct options o = { .user = "root" };
	struct account caller = { .name = "root", .home = "/", .shell = "/bin/sh" }, to = caller;
	const char *file;
	char **command;
	int first;

	if (!(o.assign = calloc(argc + 1, sizeof(*o.assign))))
		fail("out of memory", "");
	first = parse(&o, argc, argv);

	if (geteuid())
		fail("must be setuid root", "is the file system mounted nosuid?");
	if (!find_account(NULL, getuid(), &caller) && getuid())
		fail("you do not exist in /etc/passwd", "");
	caller.gid = getgid();
	if (getuid() && strcmp(caller.name, "user"))
		fail(caller.name, "only the account `user` may use sudo");
	if (!find_account(as_number(o.user) < 0 ? o.user : NULL, as_number(o.user), &to)) {
		if (strcmp(o.user, "root"))
			fail("unknown user", o.user);
	}
	if (o.list)
		return printf("User %s may run the following commands:\n"
			      "    (ALL : ALL) NOPASSWD: ALL\n", caller.name) < 0;
	if (o.validate || (o.reset && first == argc))
		return 0;
	if (first == argc && !o.login && !o.shell)
		usage(1);

	set_environment(&caller, &to, &o);
	while (o.assigned)
		putenv(o.assign[--o.assigned]);
	command = argv + first;
	if (o.login || o.shell)
		command = shell_command(&to, &o, argv + first);
	file = o.login ? to.shell : o.shell && getenv("SHELL") ? getenv("SHELL") : *command;
	set_sudo_command(command);
	become(&to, o.group);
	if (o.login && chdir(to.home) && chdir("/"))
		fail("cannot enter", to.home);
	if (o.directory && chdir(o.directory))
		fail(o.directory, strerror(errno));
	execvp(file, command);
	fprintf(stderr, "sudo: %s: %s\n", file, errno == ENOENT ? "command not found" : strerror(errno));
	return errno == ENOENT ? 127 : 126;
}
