#include "users.h"

#include <grp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "report.h"

/* Read these files as runc and Docker do (github.com/moby/sys/user): columns that a short line lacks are empty, text in place
 * of a number is 0, the first line that matches counts, and a number is always an id and never a name. */
enum { COLUMNS = 7, NAME = 256 };

struct table {
    FILE *file;
    char *line;
    size_t size;
    char *columns[COLUMNS];
};

static void close_table(struct table *table)
{
    if (table->file)
        fclose(table->file);
    free(table->line);
}

/* Split the next line that is not blank, however long it is. */
static bool next_entry(struct table *table)
{
    static const char blanks[] = " \t\r\n\v\f";
    static char empty[1];

    while (table->file && getline(&table->line, &table->size, table->file) >= 0) {
        char *rest = table->line + strspn(table->line, blanks);
        for (size_t length = strlen(rest); length && strchr(blanks, rest[length - 1]); length--)
            rest[length - 1] = 0;
        if (!*rest)
            continue;
        for (int i = 0; i < COLUMNS; i++)
            table->columns[i] = rest ? strsep(&rest, ":") : empty;
        return true;
    }
    return false;
}

static bool parse_id(const char *text, unsigned *id)
{
    char *end;
    unsigned long value;

    if (*text < '0' || *text > '9')
        return false;
    value = strtoul(text, &end, 10);
    *id = (unsigned)value;
    return *end == 0 && value < 0xffffffffUL;
}

static unsigned number_in(const char *column)
{
    unsigned id;

    if (*column == '-' && parse_id(column + 1, &id))
        return -id; /* truncated to 16 bits it is not 0, which is root */
    return parse_id(column, &id) ? id : 0;
}

/* By number, else by name; no name is root. A number without an entry is allowed, and so is root. */
static bool find_user(const char *name, struct user *user, char login[NAME])
{
    struct table table = {.file = fopen("/etc/passwd", "re")};
    unsigned id = 0;
    bool is_number = !*name || parse_id(name, &id), found = false;

    while (!found && next_entry(&table)) {
        unsigned entry = number_in(table.columns[2]);
        found = is_number ? entry == id : strcmp(table.columns[0], name) == 0;
        if (!found)
            continue;
        user->id = entry;
        user->group = number_in(table.columns[3]);
        snprintf(login, NAME, "%s", table.columns[0]);
        if (*table.columns[5])
            snprintf(user->home, sizeof user->home, "%s", table.columns[5]);
    }
    close_table(&table);
    if (!found && is_number)
        user->id = id;
    return found || is_number;
}

static bool find_group(const char *name, gid_t *group)
{
    struct table table = {.file = fopen("/etc/group", "re")};
    unsigned id = 0;
    bool is_number = parse_id(name, &id), found = is_number;

    while (!found && next_entry(&table))
        if (strcmp(table.columns[0], name) == 0) {
            id = number_in(table.columns[2]);
            found = true;
        }
    close_table(&table);
    if (found)
        *group = id;
    return found;
}

static bool lists_member(char *members, const char *login)
{
    char *member;

    while ((member = strsep(&members, ",")))
        if (strcmp(member, login) == 0)
            return true;
    return false;
}

static void find_supplementary(const char *login, struct user *user)
{
    struct table table = {.file = fopen("/etc/group", "re")};

    while (user->group_count < sizeof user->groups / sizeof user->groups[0] && next_entry(&table))
        if (lists_member(table.columns[3], login))
            user->groups[user->group_count++] = number_in(table.columns[2]);
    close_table(&table);
}

int users_find(const char *name, struct user *user, struct child_status *status)
{
    char person[NAME], group[NAME] = "", login[NAME] = "";

    memset(user, 0, sizeof *user);
    strcpy(user->home, "/");
    name = name ? name : "";
    size_t length = strcspn(name, ":");
    snprintf(person, sizeof person, "%.*s", (int)length, name);
    if (name[length])
        snprintf(group, sizeof group, "%.*s", (int)strcspn(name + length + 1, ":"), name + length + 1);
    if (!find_user(person, user, login)) {
        child_status_fail_with(status, "user %s is not in the image's /etc/passwd", person);
        return -1;
    }
    if (*group && !find_group(group, &user->group)) {
        child_status_fail_with(status, "group %s is not in the image's /etc/group", group);
        return -1;
    }
    user->groups[user->group_count++] = user->group;
    if (!*group && *login) /* OCI image specification, conversion.md: only if no group is given */
        find_supplementary(login, user);
    return 0;
}

int users_become(const struct user *user)
{
    /* A test without root runs in a user namespace that denies setgroups(2). */
    if (setgroups(user->group_count, user->groups) && !report_test_mode)
        return -1;
    return setgid(user->group) || setuid(user->id) ? -1 : 0;
}
